"""What happened: counters of each layer and phase, and the observers of a run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from fate.core import ExpertKey, Routing, StepStats
from fate.trace.observer import LayerEvent, Observer
from fate.transfer.scheduler import Transfer


class Accounting:
    """Counters of `num_layers` layers, of prompts and of decoding. Transfer threads count bytes under a lock."""

    def __init__(self, num_layers: int) -> None:
        self._phases = {prefill: [StepStats() for _ in range(num_layers)] for prefill in (False, True)}
        self._lock = threading.Lock()
        self._seen: list[set[int]] = [set() for _ in range(num_layers)]
        self.observers: tuple[Observer, ...] = ()

    def of(self, routing: Routing) -> StepStats:
        """The counters that a use of this routing belongs to."""
        return self._phases[routing.prefill][routing.layer]

    def layers(self, prefill: bool) -> list[StepStats]:
        """A copy of each layer's counters in one phase since the engine began."""
        return [replace(stats) for stats in self._phases[prefill]]

    def first_accesses(self, routing: Routing) -> int:
        """How many of its experts were never asked for before."""
        seen = self._seen[routing.layer]
        if seen.issuperset(routing.pairs_per_expert):
            return 0
        new = len(routing.pairs_per_expert.keys() - seen)
        seen.update(routing.pairs_per_expert)
        return new

    def count_read(self, transfer: Transfer, prefetched_bytes: int, demanded_bytes: int) -> None:
        """Bytes that arrived: the scheduler's meter."""
        stats = self._phases[transfer.prefill][transfer.key.layer]
        with self._lock:
            stats.prefetch_bytes += prefetched_bytes
            stats.demand_bytes += demanded_bytes
            if transfer.offset:
                stats.upgrade_bytes += prefetched_bytes + demanded_bytes

    def tell(self, event: LayerEvent) -> None:
        for observer in self.observers:
            observer.on_layer(event)

    def tell_request(self) -> None:
        for observer in self.observers:
            observer.on_request()

    def tell_read(self, key: ExpertKey, kind: str, start_s: float, end_s: float, num_bytes: int) -> None:
        for observer in self.observers:
            observer.on_read(key, kind, start_s, end_s, num_bytes)

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator[None]:
        """Tell `observer` as long as the context is open."""
        self.observers = (*self.observers, observer)
        try:
            yield
        finally:
            self.observers = tuple(one for one in self.observers if one is not observer)
