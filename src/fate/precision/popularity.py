"""Hybrid quantization of prompts: experts that many tokens want whole, the tail at INT2, as far as time allows."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fate.core import Precision, Routing
from fate.precision.base import PRECISIONS, PrecisionPolicy, Timing

# So few tokens leave a layer no time to hide reads behind, and each expert few tokens to average its error over: they
# are read as decoding reads.
DECODE_LIKE_TOKENS = 4


@PRECISIONS.register("popularity")
class Popularity(PrecisionPolicy):
    """Decoding reads whole records. A prompt's layer reads as many of the missing experts whole, the most popular
    first, as its own compute hides when the others are read at INT2; none, where even INT2 for all takes longer.

    Lossy. Source: Fate, arXiv 2502.12224, hybrid quantization in prefill.
    """

    needs_timing = True

    def __init__(self, timing: Timing | None = None) -> None:
        super().__init__(timing)
        if timing is None:
            raise TypeError("precision 'popularity' divides a layer's time: construct it with a Timing")
        self._timing = timing

    def choose(self, routing: Routing, missing: Collection[int]) -> Mapping[int, Precision]:
        wanted = dict.fromkeys(routing.pairs_per_expert, Precision.FULL)
        if routing.prefill and routing.tokens > DECODE_LIKE_TOKENS:
            layer = routing.layer
            full_s, int2_s = (self._timing.transfer_s(layer, p) for p in (Precision.FULL, Precision.INT2))
            whole = full_reads(len(missing), full_s, int2_s, self._timing.compute_s(layer, routing.tokens))
            wanted.update(dict.fromkeys(tuple(missing)[whole:], Precision.INT2))
        return wanted


def full_reads(missing: int, full_s: float, int2_s: float, budget_s: float) -> int:
    """The largest n <= missing with n * full_s + (missing - n) * int2_s <= budget_s; 0 where there is none.

    All of them where INT2 saves no time.
    """
    if full_s <= int2_s:
        return missing
    return min(missing, max(0, int((budget_s - missing * int2_s) // (full_s - int2_s))))
