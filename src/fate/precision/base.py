"""The seam for precision: how deep an expert's record is read for the work at hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Protocol

from fate.core import Precision, Routing
from fate.registry import Registry


class Timing(Protocol):
    """What a profile of this machine and store says; seconds."""

    def compute_s(self, layer: int, tokens: int) -> float:
        """One MoE layer of the model (attention, router, shared and routed experts) for so many tokens, resident."""

    def transfer_s(self, layer: int, precision: Precision) -> float:
        """One expert of the layer from the slower tier, read to this depth, on an idle link."""


class PrecisionPolicy(ABC):
    """`exact` policies never change an output; the others are lossy and must be asked for by name. `timing` is None
    unless the policy says that it `needs_timing`."""

    exact = False
    needs_timing = False

    def __init__(self, timing: Timing | None = None) -> None:
        self.timing = timing

    @abstractmethod
    def choose(self, routing: Routing, missing: Collection[int]) -> Mapping[int, Precision]:
        """The least precision every expert of `routing` may be computed at in this step.

        missing: those not resident in full, the most popular first; what is resident is computed as it is when that
        is more than the least.
        """


PRECISIONS: Registry[type[PrecisionPolicy]] = Registry("precision policy")
