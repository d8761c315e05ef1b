"""The seam for prediction: which experts will layers ahead need, before their routers have spoken.

A predictor sees what each layer's router saw and decided, and names experts of later layers. It may be wrong at no
cost but the bytes it moves; it never decides routing. Torch-free: gate inputs are opaque here, and a `Gate` applies
a router to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fate.core import Prediction, Routing
from fate.registry import Registry

Ranked = tuple[tuple[int, float], ...]


class Gate(Protocol):
    """A layer's router, usable on any gate input without disturbing the model."""

    def rank(self, gate_input: Any, limit: int) -> Sequence[Ranked] | None:
        """Of each row: at most `limit` experts, those this router would choose first, each with the gate's probability;
        None: the router cannot be asked."""

    def shares(self, gate_input: Any) -> Ranked | None:
        """Of all rows together: each chosen expert's share of the routing weights, the largest first."""


@dataclass(frozen=True)
class PredictorContext:
    """What a predictor may build on.

    gates: of each MoE layer, None where a router cannot be asked. incomplete: whether a layer has experts that are not
    in its cache; without them a prefetch is not worth making. num_experts: of each layer. top_k: experts of one token
    in a layer. cached: the experts in a layer's cache, staged ones apart. link_load: for what share of the last steps
    the link was busy.
    """

    gates: Sequence[Gate | None]
    incomplete: Callable[[int], bool]
    num_experts: Sequence[int] = ()
    top_k: int = 1
    cached: Callable[[int], Container[int]] = lambda layer: ()
    link_load: Callable[[], float] = lambda: 0.0


class Predictor(ABC):
    """needs_future: it is told what will be routed (`oracle.py`), which only who runs the same again can."""

    needs_future = False

    def __init__(self, context: PredictorContext) -> None:
        self.context = context

    @abstractmethod
    def predict(self, routing: Routing, gate_input: Any) -> Sequence[Prediction]:
        """Called when `routing` of a layer is known; names experts of later layers (of this token, or of the next: the
        first layers again), nearest first. gate_input: what the router saw, None where it cannot be had."""

    def begin_step(self, step: Any) -> Sequence[Prediction]:
        """Called when a forward begins, before its first layer: for predictors that know the whole token at once. step:
        the model's input, token ids or embeddings [batch, tokens, ...]."""
        return ()

    def begin_request(self) -> None:  # noqa: B027 - most predictors keep nothing of a request
        """A new sequence starts with the next routing of layer 0."""


PREDICTORS: Registry[type[Predictor]] = Registry("predictor")
