"""From routing to experts in slots: the step between a layer's router and its kernels.

`acquire(routing)` opens a *lease*: experts that are resident are pinned, the others are demanded at once; iterating
over the lease yields groups of experts as they can be computed, resident ones first, then in order of arrival. What a
layer needs beyond its share of slots passes through the transient region in waves. `prefetch` stages guesses there.
Only this module knows both the cache and the predictor's output.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType

from fate.cache import Entry, ExpertCache
from fate.core import ExpertKey, Precision, Prediction, Routing, StepStats
from fate.precision import PrecisionPolicy
from fate.store.format import StoreHeader
from fate.transfer.scheduler import State, Transfer, TransferScheduler, raise_if_failed

Slot = Entry[Transfer]


class ExpertManager:
    """Residency of the experts of one model. One lease is open at a time; others wait for it."""

    def __init__(
        self,
        header: StoreHeader,
        cache: ExpertCache[Transfer],
        scheduler: TransferScheduler,
        precision: PrecisionPolicy,
    ) -> None:
        self.header = header
        self.cache = cache
        self.scheduler = scheduler
        self.precision = precision
        self.stats = StepStats()
        self.lock = threading.RLock()
        self._predicted: dict[int, frozenset[int]] = {}
        self._draining: list[tuple[Transfer, int]] = []  # cancelled reads that still write to their slot

    def acquire(self, routing: Routing) -> Lease:
        """A context manager over the experts of `routing`; see `Lease`."""
        return Lease(self, routing)

    def prefetch(self, prediction: Prediction) -> None:
        """Stage and queue what is predicted and not resident, most confident first, while there is room."""
        layer = prediction.layer
        with self.lock:
            self._predicted[layer] = frozenset(prediction.experts)
            routing = Routing(layer, dict.fromkeys(prediction.experts, 1))
            for expert, confidence in prediction.ranked:
                key = ExpertKey(layer, expert)
                if self.cache.lookup(key) is not None:
                    continue
                self._reap()
                entry = self.cache.stage(key)
                if entry is None:
                    return
                entry.precision = self.precision.wanted(routing, expert)
                span = self.header.layout(layer).span(None, entry.precision)
                entry.transfer = self.scheduler.prefetch(key, entry.slot, *span, confidence)
                entry.prefetched = True
                if entry.transfer is None:
                    self.cache.drop(entry)
                    return

    def snapshot(self) -> StepStats:
        """Counters since the model was loaded."""
        moved = self.scheduler.stats
        return self.stats + StepStats(
            demand_bytes=moved.demand_bytes, prefetch_bytes=moved.prefetch_bytes, evictions=self.cache.evictions
        )

    def demand(self, entry: Slot, held: Precision | None, wanted: Precision) -> None:
        """Queue the read that brings `entry` from `held` to `wanted`."""
        span = self.header.layout(entry.key.layer).span(held, wanted)
        entry.precision = wanted
        entry.transfer = self.scheduler.demand(entry.key, entry.slot, *span)

    def drop_staged(self, entry: Slot) -> None:
        """Forget a transient expert; its slot comes back at once, or when the read in it has stopped."""
        if entry.transfer is None or self.scheduler.cancel(entry.transfer):
            self.cache.drop(entry)
        else:
            self.cache.drop(entry, keep_slot=True)
            self._draining.append((entry.transfer, entry.slot))

    def expire(self, routing: Routing) -> None:
        """Guesses for this layer that its routing did not confirm."""
        for entry in self.cache.staged():
            unused = entry.key.layer == routing.layer and entry.key.expert not in routing.tokens_per_expert
            if unused and not entry.pins:
                self.drop_staged(entry)

    def stage_for_demand(self, key: ExpertKey) -> Slot | None:
        """A transient slot for an expert that is needed now; guesses give way. None: all hold needed experts."""
        self._reap()
        entry = self.cache.stage(key)
        if entry is not None:
            return entry
        for guess in self.cache.staged():
            if not guess.pins:
                self.drop_staged(guess)
                if (entry := self.cache.stage(key)) is not None:
                    return entry
        return None

    def draining(self) -> list[Transfer]:
        return [transfer for transfer, _ in self._draining]

    def count_access(self, routing: Routing, expert: int, entry: Slot | None) -> None:
        """One access: `entry` is what was resident (landed or not) when the layer asked."""
        s = self.stats
        s.accesses += 1
        landed = entry is not None and entry.transfer is None
        s.hits += landed
        if entry is not None and not entry.prefetched:
            return
        s.uncached += 1
        s.covered += expert in self._predicted.get(routing.layer, ())
        if entry is not None:
            s.prefetch_hits += landed
            s.late_prefetches += not landed
            length = self.header.layout(routing.layer).span(None, entry.precision)[1]
            s.prefetch_used_bytes += length if entry.transfer is None else entry.transfer.bytes_read

    def _reap(self) -> None:
        """Take back slots whose cancelled reads have stopped."""
        still = []
        for transfer, slot in self._draining:
            if transfer.finished:
                self.cache.free_slot(slot)
            else:
                still.append((transfer, slot))
        self._draining = still


class Lease:
    """Experts of one layer for one step. Iterate once, inside `with`; each yielded group is pinned until the next.

    >>> with manager.acquire(routing) as lease:
    ...     for group in lease:
    ...         compute([entry.slot for entry in group])

    Raises ChecksumError, TransferError or ClosedError when an expert cannot be had.
    """

    def __init__(self, manager: ExpertManager, routing: Routing) -> None:
        self._m = manager
        self._routing = routing
        self._ready: list[Slot] = []
        self._waiting: list[Slot] = []
        self._overflow: deque[ExpertKey] = deque()

    def __enter__(self) -> Lease:
        self._m.lock.acquire()
        try:
            self._open()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release(self._ready)
        self._release(self._waiting)
        self._m.lock.release()

    def __iter__(self) -> Iterator[list[Slot]]:
        if self._ready:
            yield self._ready
            self._release(self._ready)
        while self._waiting or self._overflow:
            self._admit_overflow()
            landed = self._landed()
            if not landed:
                self._stall()
                continue
            self._ready = landed
            yield landed
            self._release(landed)

    def _open(self) -> None:
        m, routing = self._m, self._routing
        m.expire(routing)
        resident: list[Slot] = []
        missing: list[ExpertKey] = []
        for expert in routing.experts:  # pin first, so that no admission below evicts what is needed
            key = ExpertKey(routing.layer, expert)
            entry = self._lookup(key)
            m.count_access(routing, expert, entry)
            if entry is None:
                missing.append(key)
            else:
                entry.pins += 1
                resident.append(entry)
        for entry in resident:
            self._keep(entry)
        for key in missing:
            entry = m.cache.admit(key)
            if entry is None:
                self._overflow.append(key)
            else:
                self._demand(entry)
        self._admit_overflow()

    def _lookup(self, key: ExpertKey) -> Slot | None:
        """The resident entry, its finished transfer settled; a guess whose read failed counts as absent."""
        entry = self._m.cache.lookup(key)
        if entry is not None and entry.transfer is not None and entry.transfer.finished:
            if entry.transfer.state is not State.DONE:
                self._m.cache.drop(entry)
                return None
            entry.transfer = None
        return entry

    def _keep(self, entry: Slot) -> None:
        """A resident expert was asked for: order it in the cache, and bring it to the precision wanted."""
        m = self._m
        entry.prefetched = False
        if entry.staged:
            m.cache.promote(entry)
        else:
            m.cache.touch(entry)
        wanted = m.precision.wanted(self._routing, entry.key.expert)
        if entry.transfer is not None:
            m.scheduler.upgrade(entry.transfer)
        if entry.precision < wanted:
            if entry.transfer is not None:  # rare: the shallow read is still under way, the rest must follow it
                self._m.stats.stall_s += m.scheduler.wait_any([entry.transfer])
                raise_if_failed(entry.transfer)
            m.demand(entry, entry.precision, wanted)
        (self._ready if entry.transfer is None else self._waiting).append(entry)

    def _demand(self, entry: Slot) -> None:
        entry.pins += 1
        self._waiting.append(entry)
        self._m.demand(entry, None, self._m.precision.wanted(self._routing, entry.key.expert))

    def _admit_overflow(self) -> None:
        """Start reading further experts through the transient region as far as it has room."""
        while self._overflow:
            entry = self._m.stage_for_demand(self._overflow[0])
            if entry is None:
                return
            self._overflow.popleft()
            self._demand(entry)

    def _landed(self) -> list[Slot]:
        landed = [e for e in self._waiting if e.transfer is None or e.transfer.finished]
        for entry in landed:
            if entry.transfer is not None:
                raise_if_failed(entry.transfer)
            entry.transfer = None
        self._waiting = [e for e in self._waiting if e not in landed]
        return landed

    def _stall(self) -> None:
        m = self._m
        pending = [e.transfer for e in self._waiting if e.transfer is not None] or m.draining()
        m.stats.stall_s += m.scheduler.wait_any(pending)

    def _release(self, entries: list[Slot]) -> None:
        """Unpin; what only passed through leaves."""
        for entry in entries:
            entry.pins -= 1
            if entry.staged and not entry.pins:
                self._m.drop_staged(entry)
        entries.clear()
