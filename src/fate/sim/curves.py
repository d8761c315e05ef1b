"""Misses of LRU for every capacity at once, which tell how much each layer's next slot is worth.

Mattson's stack distances (IBM Systems Journal 9(2), 1970) give them in one pass where the order of recency is the same
at every capacity. Here it is not: a step's hits become recent before its misses do, and which are hits depends on the
capacity. So each capacity keeps its own order, and numpy steps all of them together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fate.core import Routing
from fate.trace import RoutingTrace


def lru_miss_curves(trace: RoutingTrace, *, prefill: bool = True) -> list[list[int]]:
    """misses[layer][c] of a run that loads on demand with LRU and c slots, for c = 0 .. experts of the layer.

    prefill: count the misses of prefill steps too; uncounted, they still fill the cache.
    """
    curves = []
    for layer, num_experts in enumerate(trace.meta.num_experts):
        caches = _Caches(num_experts)
        misses = np.zeros(num_experts + 1, dtype=np.int64)
        for step in trace.steps:
            missed = caches.step(step.routing(layer))
            if prefill or not step.prefill:
                misses += missed
        curves.append([int(count) for count in misses])
    return curves


class _Caches:
    """One LRU cache for each capacity 0 .. num_experts of one layer. Row c of every array is the cache with c slots."""

    def __init__(self, num_experts: int) -> None:
        self._capacities = np.arange(num_experts + 1)[:, None]
        # When each expert was last accessed, [capacities, experts]; 0: not cached.
        self._last: NDArray[np.int64] = np.zeros((num_experts + 1, num_experts), dtype=np.int64)
        self._clock = 1

    def step(self, routing: Routing) -> NDArray[np.int64]:
        """Misses [capacities] of one step; the same rules as `engine/lease.py`."""
        experts = list(routing.experts)
        hit = self._last[:, experts] > 0
        hits = hit.sum(axis=1, keepdims=True)
        admitted = hit | ((~hit).cumsum(axis=1) + hits <= self._capacities)
        recency = np.arange(len(experts))
        hit_time = self._clock + recency[::-1]
        miss_time = self._clock + len(experts) + recency
        self._clock += 2 * len(experts)
        self._last[:, experts] = 0
        self._keep_newest(self._capacities - admitted.sum(axis=1, keepdims=True))
        self._last[:, experts] = np.where(admitted, np.where(hit, hit_time, miss_time), 0)
        missed: NDArray[np.int64] = len(experts) - hits[:, 0]
        return missed

    def _keep_newest(self, room: NDArray[np.int64]) -> None:
        """Leave the `room` [capacities, 1] most recently accessed experts of each cache."""
        num_experts = self._last.shape[1]
        ordered = np.sort(self._last, axis=1)
        oldest_kept = np.take_along_axis(ordered, np.minimum(num_experts - room, num_experts - 1), axis=1)
        self._last[(self._last < oldest_kept) | (room == 0)] = 0
