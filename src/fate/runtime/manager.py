"""From routing to experts in slots: the step between a layer's router and its kernels.

`acquire(routing)` opens a *lease*: experts that are resident are pinned, the others are demanded at once; iterating
over the lease yields groups of experts as they can be computed, resident ones first, then in order of arrival. What a
layer needs beyond its share of slots passes through the transient region in waves. `prefetch` stages guesses there.
Only this module knows both the cache and the predictor's output.

A lease is used under `ExpertManager.lock`, so one is open at a time. One that does not end well (a failed read, a
KeyboardInterrupt anywhere) leaves the manager marked; the next lease then starts from an empty cache.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType

from fate.cache import Entry, ExpertCache
from fate.core import ExpertKey, Precision, Prediction, Routing, StepStats
from fate.errors import ClosedError
from fate.precision import PrecisionPolicy
from fate.store.format import StoreHeader
from fate.transfer.scheduler import State, Transfer, TransferScheduler, require_done

Slot = Entry[Transfer]


class ExpertManager:
    """Residency of the experts of one model. Hold `lock` around a lease and around `prefetch`."""

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
        self._closed = False
        self._lease_open = False
        self._seen: set[ExpertKey] = set()
        self._predicted: dict[int, frozenset[int]] = {}
        self._draining: list[tuple[Transfer, int]] = []  # cancelled reads that still write to their slot

    def acquire(self, routing: Routing) -> Lease:
        """A context manager over the experts of `routing`; see `Lease`."""
        return Lease(self, routing)

    def incomplete(self, layer: int) -> bool:
        """Whether `layer` has experts that are not cached: only then is a guess worth making."""
        return self.cache.num_cached(layer) < self.header.layers[layer].num_experts

    def close(self) -> None:
        """Stop the transfers once no lease is open; later leases raise ClosedError."""
        with self.lock:
            self._closed = True
            self.scheduler.close()

    def prefetch(self, prediction: Prediction) -> None:
        """Stage and queue what is predicted and not resident, most confident first, while there is room."""
        layer = prediction.layer
        self._predicted[layer] = frozenset(prediction.experts)
        routing = Routing(layer, dict.fromkeys(prediction.experts, 1))
        for expert, confidence in prediction.ranked:
            key = ExpertKey(layer, expert)
            if self.cache.lookup(key) is not None:
                continue
            self.reap()
            entry = self.cache.stage(key)
            if entry is None:
                return
            transfer = self._transfer(entry, self.precision.wanted(routing, expert))
            transfer.demand, transfer.confidence = False, confidence
            entry.transfer, entry.prefetched = transfer, True
            if not self.scheduler.prefetch(transfer):
                self.cache.drop(entry)
                return

    def snapshot(self) -> StepStats:
        """Counters since the model was loaded."""
        moved = self.scheduler.stats
        return self.stats + StepStats(
            demand_bytes=moved.demand_bytes, prefetch_bytes=moved.prefetch_bytes, evictions=self.cache.evictions
        )

    def open_lease(self) -> None:
        """Begin a lease, from nothing if the last one did not end well."""
        if self._closed:
            raise ClosedError()
        if self._lease_open:
            self.scheduler.quiesce()
            self._draining.clear()
            self._predicted.clear()
            self.cache.clear()
        self._lease_open = True
        self.reap()

    def close_lease(self) -> None:
        self.cache.pinned.clear()
        self._lease_open = False

    def demand(self, entry: Slot, wanted: Precision) -> None:
        """Queue the read that brings `entry` from what it holds to `wanted`."""
        entry.transfer = self._transfer(entry, wanted)
        self.scheduler.demand(entry.transfer)

    def settle(self, entry: Slot) -> bool:
        """Take note of a finished read; False (and the entry is gone) if it brought nothing."""
        transfer = entry.transfer
        if transfer is None or not transfer.finished:
            return True
        if transfer.state is not State.DONE:
            self.cache.drop(entry)
            return False
        entry.precision, entry.transfer = transfer.precision, None
        return True

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
            if entry.key.layer == routing.layer and entry.key.expert not in routing.pairs_per_expert:
                self.drop_staged(entry)

    def stage_for_demand(self, key: ExpertKey) -> Slot | None:
        """A transient slot for an expert that is needed now; guesses give way. None: all hold needed experts."""
        self.reap()
        entry = self.cache.stage(key)
        if entry is not None:
            return entry
        for guess in self.cache.staged():
            if guess.key not in self.cache.pinned:
                self.drop_staged(guess)
                if (entry := self.cache.stage(key)) is not None:
                    return entry
        return None

    def draining(self) -> list[Transfer]:
        return [transfer for transfer, _ in self._draining]

    def reap(self) -> None:
        """Take back slots whose cancelled reads have stopped."""
        still = []
        for transfer, slot in self._draining:
            if transfer.finished:
                self.cache.free_slot(slot)
            else:
                still.append((transfer, slot))
        self._draining = still

    def count_accesses(self, routing: Routing, found: dict[int, Slot]) -> None:
        """One access per expert of `routing`; `found`: those resident, landed or not, when the layer asked."""
        s, predicted = self.stats, self._predicted.pop(routing.layer, frozenset())
        for expert in routing.experts:
            key, entry = ExpertKey(routing.layer, expert), found.get(expert)
            s.accesses += 1
            if key not in self._seen:
                self._seen.add(key)
                s.first_accesses += 1
            landed = entry is not None and entry.transfer is None
            wanted = self.precision.wanted(routing, expert)
            s.hits += landed and entry is not None and entry.precision is not None and entry.precision >= wanted
            if entry is not None and not entry.prefetched:
                continue
            s.uncached += 1
            s.covered += expert in predicted
            if entry is not None:
                s.prefetch_hits += landed
                s.late_prefetches += not landed
                span = self.header.layout(routing.layer).span(None, entry.precision or wanted)
                s.prefetch_used_bytes += self.scheduler.upgrade(entry.transfer) if entry.transfer else span[1]

    def _transfer(self, entry: Slot, wanted: Precision) -> Transfer:
        span = self.header.layout(entry.key.layer).span(entry.precision, wanted)
        return Transfer(entry.key, entry.slot, *span, precision=wanted)


class Lease:
    """Experts of one layer for one step. Iterate once, inside `with`; each yielded group is pinned until the next.

    >>> with manager.lock, manager.acquire(routing) as lease:
    ...     for group in lease:
    ...         compute([entry.slot for entry in group])

    Raises ChecksumError, StoreError, TransferError or ClosedError when an expert cannot be had.
    """

    def __init__(self, manager: ExpertManager, routing: Routing) -> None:
        self._m = manager
        self._routing = routing
        self._ready: list[Slot] = []
        self._waiting: list[Slot] = []
        self._overflow: deque[ExpertKey] = deque()

    def __enter__(self) -> Lease:
        m, routing = self._m, self._routing
        m.open_lease()
        m.expire(routing)
        found = {expert: entry for expert in routing.experts if (entry := self._resident(expert)) is not None}
        m.count_accesses(routing, found)
        m.cache.pinned.update(entry.key for entry in found.values())  # before any admission may evict them
        for entry in found.values():
            self._keep(entry)
        for expert in routing.experts:
            if expert not in found:
                self._load(ExpertKey(routing.layer, expert))
        self._admit_overflow()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._m.close_lease()

    def __iter__(self) -> Iterator[list[Slot]]:
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

    def _resident(self, expert: int) -> Slot | None:
        """The entry that holds or awaits the expert; a guess whose read failed counts as absent."""
        entry = self._m.cache.lookup(ExpertKey(self._routing.layer, expert))
        return entry if entry is not None and self._m.settle(entry) else None

    def _keep(self, entry: Slot) -> None:
        """A resident expert was asked for: order it in the cache, and bring it to the precision wanted."""
        m = self._m
        entry.prefetched = False
        if entry.staged:
            m.cache.promote(entry)
        else:
            m.cache.touch(entry)
        wanted = m.precision.wanted(self._routing, entry.key.expert)
        if entry.transfer is not None and entry.transfer.precision < wanted:
            m.stats.stall_s += m.scheduler.wait_any([entry.transfer])  # rare: the rest must follow the prefix
            self._settle_or_raise(entry)
        if entry.transfer is None and (entry.precision is None or entry.precision < wanted):
            m.demand(entry, wanted)
        (self._ready if entry.transfer is None else self._waiting).append(entry)

    def _load(self, key: ExpertKey) -> None:
        entry = self._m.cache.admit(key)
        if entry is None:
            self._overflow.append(key)
        else:
            self._demand(entry)

    def _demand(self, entry: Slot) -> None:
        self._m.cache.pinned.add(entry.key)
        self._waiting.append(entry)
        self._m.demand(entry, self._m.precision.wanted(self._routing, entry.key.expert))

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
            self._settle_or_raise(entry)
            self._waiting.remove(entry)
        return landed

    def _settle_or_raise(self, entry: Slot) -> None:
        if entry.transfer is not None:
            require_done(entry.transfer)
            self._m.settle(entry)

    def _stall(self) -> None:
        m = self._m
        pending = [e.transfer for e in self._waiting if e.transfer is not None] or m.draining()
        m.stats.stall_s += m.scheduler.wait_any(pending)

    def _release(self, entries: list[Slot]) -> None:
        """Unpin; what only passed through leaves."""
        for entry in entries:
            self._m.cache.pinned.discard(entry.key)
            if entry.staged:
                self._m.drop_staged(entry)
