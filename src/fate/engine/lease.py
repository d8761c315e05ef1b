"""One layer's use of its experts in one step, from routing to the last one computed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from types import TracebackType

from fate.core import ExpertKey, Precision, Routing
from fate.engine.manager import ExpertManager, Slot
from fate.transfer.scheduler import require_done


class Lease:
    """Experts of one layer for one step. Iterate once, inside `with`; each yielded group is pinned until the next.

    What is resident comes first, then experts in order of arrival. What a layer needs beyond its share of slots passes
    through the transient region in waves.

    >>> with manager.lock, manager.begin(routing) as lease:
    ...     for group in lease:
    ...         compute([entry.slot for entry in group])

    Raises ChecksumError, StoreError, TransferError or ClosedError when an expert cannot be had.
    """

    def __init__(self, manager: ExpertManager, routing: Routing) -> None:
        self.routing = routing
        self._m = manager
        self._wanted: Mapping[int, Precision] = {}
        self._whole: list[Slot] | None = None  # all of them, if nothing is to be read
        self._ready: list[Slot] = []
        self._waiting: list[Slot] = []
        self._overflow: deque[ExpertKey] = deque()

    def open(self) -> None:
        """Pin what is resident and demand the rest, the most popular first; the manager calls this."""
        m, routing = self._m, self.routing
        self._whole = m.take_whole(routing)
        if self._whole is not None:
            return
        evictions = m.cache.evictions
        m.expire(routing)
        found = {expert: entry for expert in routing.experts if (entry := self._resident(expert)) is not None}
        missing = [e for e in routing.experts if e not in found or found[e].precision is not Precision.FULL]
        self._wanted = m.precision.choose(routing, missing)
        m.count_accesses(routing, found, [self._wanted[expert] for expert in routing.experts])
        m.cache.pinned.update(entry.key for entry in found.values())  # before any admission may evict them
        for entry in reversed(found.values()):  # so that the most popular is the most recent
            self._keep(entry)
        self._ready.reverse()
        for expert in routing.experts:
            if expert not in found and not self._take_early(expert):
                self._load(ExpertKey(routing.layer, expert))
        self._admit_overflow()
        m.stats[routing.layer].evictions += m.cache.evictions - evictions

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._m.end(self)

    def __iter__(self) -> Iterator[list[Slot]]:
        if self._whole is not None:
            if self._whole:  # a router may choose nobody
                yield self._whole
            self._m.pump()
            return
        if self._ready:
            yield self._ready
            self._release(self._ready)
        while self._waiting or self._overflow:
            self._admit_overflow()
            landed = self._landed()
            if landed:
                yield landed
                self._release(landed)
            else:
                self._stall()
        self._m.pump()

    def _resident(self, expert: int) -> Slot | None:
        """The entry that holds or awaits the expert; a guess whose read failed counts as absent, and so does what was
        only demanded for this lease, ahead of it."""
        entry = self._m.cache.lookup(ExpertKey(self.routing.layer, expert))
        return entry if entry is not None and self._m.settle(entry) and not entry.early else None

    def _take_early(self, expert: int) -> bool:
        """A missing expert that was demanded ahead enters the cache as any other; False where there is none, or it is
        read to less than is wanted."""
        entry = self._m.cache.lookup(ExpertKey(self.routing.layer, expert))
        if entry is None:
            return False
        coming = entry.transfer.precision if entry.transfer is not None else entry.precision
        if coming is None or coming < self._wanted[expert]:
            self._m.drop_staged(entry)
            return False
        entry.early = False
        self._m.cache.promote(entry)
        self._m.cache.pinned.add(entry.key)
        self._waiting.append(entry)
        return True

    def _keep(self, entry: Slot) -> None:
        """A resident expert was asked for: order it in the cache, and bring it to the precision wanted."""
        m = self._m
        entry.prefetched = False
        if entry.staged:
            m.cache.promote(entry)
        else:
            m.cache.touch(entry)
        wanted = self._wanted[entry.key.expert]
        held = entry.precision is not None and entry.precision >= wanted
        if entry.transfer is not None and not held:
            m.scheduler.upgrade(entry.transfer)
        elif not held:
            m.demand(entry, wanted)
        (self._ready if held else self._waiting).append(entry)

    def _load(self, key: ExpertKey) -> None:
        entry = self._m.cache.admit(key)
        if entry is None:
            self._overflow.append(key)
        else:
            self._demand(entry)

    def _demand(self, entry: Slot) -> None:
        self._m.cache.pinned.add(entry.key)
        self._waiting.append(entry)
        self._m.demand(entry, self._wanted[entry.key.expert])

    def _admit_overflow(self) -> None:
        """Start reading further experts through the transient region as far as it has room."""
        while self._overflow:
            entry = self._m.stage_for_demand(self._overflow[0])
            if entry is None:
                return
            self._overflow.popleft()
            self._demand(entry)

    def _landed(self) -> list[Slot]:
        """What has arrived whole enough; of a guess that was read to less, the rest is demanded."""
        landed = []
        for entry in [e for e in self._waiting if e.transfer is None or e.transfer.finished]:
            self._settle_or_raise(entry)
            wanted = self._wanted[entry.key.expert]
            if entry.precision is None or entry.precision < wanted:
                self._m.demand(entry, wanted)
            else:
                self._waiting.remove(entry)
                landed.append(entry)
        return landed

    def _settle_or_raise(self, entry: Slot) -> None:
        if entry.transfer is not None:
            require_done(entry.transfer)
            self._m.settle(entry)

    def _stall(self) -> None:
        self._wait(self._waiting)

    def _wait(self, entries: list[Slot]) -> None:
        m, layer = self._m, self.routing.layer
        pending = [e.transfer for e in entries if e.transfer is not None] or m.draining()
        start = time.perf_counter()
        m.scheduler.wait_any(pending)
        end = time.perf_counter()
        m.stats[layer].stall_s += end - start
        if m.timeline is not None:
            m.timeline.add(start, end, "stall", layer)

    def _release(self, entries: list[Slot]) -> None:
        """Unpin; what only passed through leaves, and guesses may take its place."""
        for entry in entries:
            self._m.cache.pinned.discard(entry.key)
            if entry.staged:
                self._m.drop_staged(entry)
        if not self._overflow:
            self._m.pump()
