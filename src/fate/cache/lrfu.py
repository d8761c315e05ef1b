"""Least recently/frequently used: evict the expert with the fewest accesses, each counting half as much every so often.

Source: Lee et al., "LRFU: A Spectrum of Policies that Subsumes the Least Recently Used and Least Frequently Used
Policies", IEEE Transactions on Computers 50(12), 2001; its lambda is 1 / half-life.
"""

from __future__ import annotations

import math
from collections.abc import Container

from fate.cache.base import POLICIES, EvictionPolicy

# Half-life of an access, in accesses to the layer, in units of its capacity. On recorded traces of seven models hits
# differ by at most 1.2 points between 1.5 and 4, and none is best everywhere.
HALF_LIFE = 2

# What a new request makes of the counts of those before it, in half-lives: its prompt then outweighs most of them.
REQUEST_FADES = 4


@POLICIES.register("lrfu")
class LRFU(EvictionPolicy):
    """All counts fade alike, so their order needs no fading: each is kept as the logarithm (base 2) of what it would be
    if the first access counted 1, and every later one more."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._cached: set[int] = set()
        self._scores: dict[int, float] = {}
        self._worth = 0.0  # of an access now, as a logarithm

    def on_hit(self, expert: int) -> None:
        self._count(expert)

    def on_insert(self, expert: int) -> None:
        self._cached.add(expert)
        self._count(expert)

    def on_evict(self, expert: int) -> None:
        self._cached.remove(expert)

    def begin_request(self) -> None:
        self._worth += REQUEST_FADES

    def victim(self, pinned: Container[int]) -> int | None:
        ascending = sorted(self._cached, key=self._scores.__getitem__)
        return next((expert for expert in ascending if expert not in pinned), None)

    def _count(self, expert: int) -> None:
        """Of an expert that was evicted the count stays: it fades all the same."""
        self._worth += 1 / (HALF_LIFE * self.capacity)
        before = self._scores.get(expert, -math.inf)
        self._scores[expert] = self._worth + math.log2(1 + 2.0 ** (before - self._worth))
