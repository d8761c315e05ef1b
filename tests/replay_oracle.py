"""Replays a routing trace through the cache that the runtime uses, as the runtime uses it when it loads on demand.

The cache, its policies and its allocations are the runtime's own objects; only `_step` is written twice, here and in
`engine/lease.py`. There is no clock: every read is over before the layer that asked for it is.

>>> trace = RoutingTrace.read("olmoe.jsonl.gz")
>>> capacities = ALLOCATIONS.get("uniform")(SlotRequest(trace.meta.num_experts, slots=512, floor=8))
>>> replay(trace, capacities, POLICIES.get("lru")).total.hit_rate
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fate.cache import EvictionPolicy, ExpertCache
from fate.core import ExpertKey, Routing
from fate.trace import RoutingTrace


@dataclass(frozen=True)
class CacheCounts:
    """Counters as in `core.StepStats`: a hit is an expert cached when its layer asks; first_accesses are misses."""

    accesses: int = 0
    hits: int = 0
    first_accesses: int = 0
    evictions: int = 0

    @property
    def misses(self) -> int:
        return self.accesses - self.hits

    @property
    def hit_rate(self) -> float:
        return self.hits / self.accesses if self.accesses else 0.0

    def __add__(self, other: CacheCounts) -> CacheCounts:
        return CacheCounts(
            self.accesses + other.accesses,
            self.hits + other.hits,
            self.first_accesses + other.first_accesses,
            self.evictions + other.evictions,
        )


@dataclass(frozen=True)
class ReplayResult:
    """Counts of each layer, in prefill steps and in decode steps."""

    prefill: tuple[CacheCounts, ...]
    decode: tuple[CacheCounts, ...]

    @property
    def layers(self) -> tuple[CacheCounts, ...]:
        """Counts of each layer, in all steps."""
        return tuple(prefill + decode for prefill, decode in zip(self.prefill, self.decode))

    @property
    def total(self) -> CacheCounts:
        return sum(self.layers, CacheCounts())


def replay(trace: RoutingTrace, capacities: Sequence[int], policy: Callable[[int], EvictionPolicy]) -> ReplayResult:
    """What a run with this trace's routing counts when it starts with an empty cache and predicts nothing.

    capacities: slots of each layer. policy: makes the eviction policy of a layer from its capacity.
    """
    cache: ExpertCache[_NoTransfer] = ExpertCache(trace.meta.num_experts, capacities, transient=1, policy=policy)
    counts = {prefill: [CacheCounts()] * trace.meta.num_layers for prefill in (True, False)}
    seen: set[ExpertKey] = set()
    request = None
    for step in trace.steps:
        if step.request != request:
            request = step.request
            cache.begin_request()
        of_phase = counts[step.prefill]
        for layer in range(trace.meta.num_layers):
            of_phase[layer] += _step(cache, step.routing(layer), seen)
    return ReplayResult(tuple(counts[True]), tuple(counts[False]))


def _step(cache: ExpertCache[_NoTransfer], routing: Routing, seen: set[ExpertKey]) -> CacheCounts:
    """One layer's use of its experts: `Lease` without bytes."""
    evictions = cache.evictions
    keys = [ExpertKey(routing.layer, expert) for expert in routing.experts]
    first_accesses = len(set(keys) - seen)
    seen.update(keys)
    found = [entry for key in keys if (entry := cache.lookup(*key)) is not None]
    cache.pinned.update(entry.key for entry in found)
    for entry in reversed(found):  # so that the most popular is the most recent
        cache.touch(entry)
    for key in keys:
        # Where every slot of the layer is pinned the expert passes through the transient region, which nothing sees.
        if cache.lookup(*key) is None and cache.admit(key) is not None:
            cache.pinned.add(key)
    cache.pinned.clear()
    return CacheCounts(len(keys), len(found), first_accesses, cache.evictions - evictions)


class _NoTransfer:
    """Nothing is read, so nothing is ever in flight."""

    finished = True
