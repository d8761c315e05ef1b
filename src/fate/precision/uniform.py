"""The same precision for every expert of every step."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fate.core import Precision, Routing
from fate.precision.base import PRECISIONS, PrecisionPolicy


@PRECISIONS.register("full")
class Full(PrecisionPolicy):
    """Whole records: the store's own precision."""

    exact = True

    def choose(self, routing: Routing, missing: Collection[int]) -> Mapping[int, Precision]:
        return dict.fromkeys(routing.pairs_per_expert, Precision.FULL)


@PRECISIONS.register("int2")
class AllINT2(PrecisionPolicy):
    """INT2 prefixes only: about 44% fewer bytes a transfer, lossy."""

    def choose(self, routing: Routing, missing: Collection[int]) -> Mapping[int, Precision]:
        return dict.fromkeys(routing.pairs_per_expert, Precision.INT2)
