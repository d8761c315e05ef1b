"""The seam for precision: how deep an expert's record is read for the work at hand."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fate.core import Precision, Routing
from fate.registry import Registry


class PrecisionPolicy(ABC):
    """`exact` policies never change an output; the others are lossy and must be asked for by name."""

    exact = False

    @abstractmethod
    def wanted(self, routing: Routing, expert: int) -> Precision:
        """The least precision `expert` may be computed at in this step."""


PRECISIONS: Registry[type[PrecisionPolicy]] = Registry("precision policy")
