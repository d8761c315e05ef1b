"""The seam for prediction: which experts will layers ahead need, before their routers have spoken.

A predictor sees what each layer's router saw and decided, and names experts of later layers. It may be wrong at no
cost but the bytes it moves; it never decides routing. Torch-free: gate inputs are opaque here, and a `Gate` applies
a router to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fate.core import Prediction, Routing
from fate.registry import Registry


class Gate(Protocol):
    """A layer's router, usable on any gate input without disturbing the model."""

    def rank(self, gate_input: Any) -> tuple[tuple[int, float], ...] | None:
        """Experts this router would choose, most confident first, with confidences in [0, 1]; None: cannot tell."""


@dataclass(frozen=True)
class PredictorContext:
    """What a predictor may build on: one gate per MoE layer (None where a router cannot be asked), and whether a layer
    has experts that are not in memory, without which a guess is not worth making."""

    gates: Sequence[Gate | None]
    incomplete: Callable[[int], bool]


class Predictor(ABC):
    def __init__(self, context: PredictorContext) -> None:
        self.context = context

    @abstractmethod
    def predict(self, routing: Routing, gate_input: Any) -> Prediction | None:
        """Called when `routing` of a layer is known; names experts of a later layer, or None."""


PREDICTORS: Registry[type[Predictor]] = Registry("predictor")
