"""MoE-Infinity's activation-aware cache: evict the expert that the current request activated least.

Source: MoE-Infinity, arXiv 2401.14361, "expert caching": the cache evicts the expert with the lowest

    (activations of the expert / activations of its layer + epsilon) * (1 - layer / num_layers)

both counted in the *expert activation matrix* of the current request, which starts at zero with every request. The
layer's factor favours shallow layers, for which prefetching comes too late. Here each layer has its own slots, so
within a layer only the activations order its experts; favouring layers is the allocation's part (`allocation.py`).
"""

from __future__ import annotations

from collections.abc import Container

from fate.cache.base import POLICIES, EvictionPolicy


@POLICIES.register("activation-aware")
class ActivationAware(EvictionPolicy):
    """Evicts the fewest activations in this request; then the fewest in earlier ones; then the least recent access.

    A step that uses an expert activates it once, also in prefill: a prompt's tokens counted one by one would outweigh
    the decoding for long, which costs hits in small caches. Of an expert that was evicted the count stays: the
    matrix is the request's, not the cache's. In the paper a request starts from equal experts and evicts at random
    until counts have built up; here earlier requests decide until then. What they counted shrinks to less than one
    activation in all, so it never outweighs one of this request.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._cached: set[int] = set()
        self._activations: dict[int, int] = {}
        self._carried: dict[int, float] = {}  # of earlier requests: each in [0, 1)
        self._last_access: dict[int, int] = {}
        self._clock = 0

    def on_hit(self, expert: int) -> None:
        self._count(expert)

    def on_insert(self, expert: int) -> None:
        self._cached.add(expert)
        self._count(expert)

    def on_evict(self, expert: int) -> None:
        self._cached.remove(expert)

    def begin_request(self) -> None:
        scores = {expert: self._score(expert) for expert in self._last_access}
        whole = 1 + max(scores.values(), default=0.0)
        self._carried = {expert: score / whole for expert, score in scores.items()}
        self._activations.clear()

    def victim(self, pinned: Container[int]) -> int | None:
        movable = (expert for expert in self._cached if expert not in pinned)
        return min(movable, key=lambda expert: (self._score(expert), self._last_access[expert]), default=None)

    def _score(self, expert: int) -> float:
        return self._activations.get(expert, 0) + self._carried.get(expert, 0.0)

    def _count(self, expert: int) -> None:
        self._clock += 1
        self._last_access[expert] = self._clock
        self._activations[expert] = self._activations.get(expert, 0) + 1
