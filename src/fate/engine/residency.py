"""Residency: which experts are in which slots of one tier, and which are on their way.

`begin(routing)` opens a *lease* for a layer whose routing is known: prefetches that routing does not confirm are
dropped, resident experts are pinned, the missing ones are demanded at once. Iterating the lease yields experts as they
become ready.

One lease is open at a time, under `Residency.lock` while it is opened and used. A lease that does not end well (a
failed read, a KeyboardInterrupt anywhere) stays open, and the next one starts from an empty cache. Whatever else
changes residency does so inside `between_leases`, with the same effect.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from types import TracebackType

from fate.cache import Entry, ExpertCache
from fate.cache.expert_cache import Origin, User
from fate.core import ExpertKey, Precision, Routing
from fate.engine.accounting import Accounting
from fate.errors import ClosedError
from fate.precision import PrecisionPolicy
from fate.store.format import StoreHeader
from fate.transfer.scheduler import State, Transfer, TransferScheduler, require_done

Slot = Entry[Transfer]


class Residency:
    """The experts of one model in the slots of one tier. Hold `lock` around every call."""

    def __init__(
        self,
        header: StoreHeader,
        cache: ExpertCache[Transfer],
        scheduler: TransferScheduler,
        precision: PrecisionPolicy,
        accounting: Accounting,
        lock: threading.RLock,
    ) -> None:
        self.header = header
        self.cache = cache
        self.scheduler = scheduler
        self.precision = precision
        self.accounting = accounting
        self.lock = lock
        self.named: dict[int, set[int]] = {}  # experts that predictions named for a layer since it last ran
        self.ranking: dict[int, tuple[int, ...]] = {}  # the last prediction for a layer, most confident first
        self.lease: Lease | None = None  # the one that is open
        self._closed = self._interrupted = False
        self._num_experts = sum(layer.num_experts for layer in header.layers)
        self._reads: dict[tuple[int, Precision | None, Precision], tuple[int, int, Precision]] = {}

    def begin(self, routing: Routing) -> Lease:
        """Open a lease on the experts of `routing`, from an empty cache if the last one did not end well."""
        if self._closed:
            raise ClosedError()
        if not self.consistent:
            self.scheduler.quiesce()
            self.named.clear()
            self.ranking.clear()
            self.cache.clear()
        lease = self.lease = Lease(self, routing)
        self._interrupted = False
        lease.open()
        return lease

    def end(self, lease: Lease) -> None:
        """The lease ended well."""
        if self.lease is lease:
            self.cache.pinned.clear()
            self.lease = None

    @property
    def consistent(self) -> bool:
        """Between two leases: whether all that was done to residency ended well."""
        return self.lease is None and not self._interrupted

    @contextmanager
    def between_leases(self) -> Iterator[None]:
        """Around changes of residency while no lease is open; only where it is `consistent`.

        There is no `finally`: after an exception residency is not consistent, and the next lease starts anew.
        """
        self._interrupted = True
        yield
        self._interrupted = False

    def incomplete(self, layer: int) -> bool:
        """Whether `layer` has experts that are not cached: only then is a prefetch worth making."""
        return self.cache.num_cached(layer) < self.header.layers[layer].num_experts

    @property
    def all_cached(self) -> bool:
        """Whether nothing is left that could be prefetched."""
        return self.cache.num_all_cached == self._num_experts

    def close(self) -> None:
        """Stop the transfers once no lease is in use; later leases raise ClosedError."""
        with self.lock:
            self._closed = True
            self.scheduler.close()

    def transfer_to(self, entry: Slot, wanted: Precision, *, demand: bool, prefill: bool = False) -> Transfer:
        """The read that brings `entry` from what it holds to `wanted`, not queued yet."""
        which = entry.key.layer, entry.precision, wanted
        if (read := self._reads.get(which)) is None:
            layout = self.header.layout(which[0])
            read = self._reads[which] = *layout.span(*which[1:]), layout.depth(wanted)
        return Transfer(entry.key, entry.slot, *read, demand=demand, prefill=prefill)

    def demand(self, entry: Slot, wanted: Precision, prefill: bool = False) -> None:
        """Queue the read that brings `entry` from what it holds to `wanted`."""
        entry.transfer = self.transfer_to(entry, wanted, demand=True, prefill=prefill)
        self.scheduler.demand(entry.transfer)

    def settle(self, entry: Slot) -> bool:
        """Take note of a finished read; False (and the entry is gone) if it leaves nothing."""
        transfer = entry.transfer
        if transfer is None or not transfer.finished:
            return True
        entry.transfer = None
        if transfer.state is State.DONE:
            entry.precision = transfer.precision
        elif entry.precision is None or transfer.state is State.FAILED:
            self.cache.drop(entry)
            return False
        return True

    def drop_staged(self, entry: Slot) -> None:
        """Forget a transient expert; its slot is free at once, or when the read in it has stopped."""
        if entry.transfer is not None:
            self.scheduler.cancel(entry.transfer)
        self.cache.drop(entry)

    def read_through(self, keys: Sequence[ExpertKey], precision: Precision) -> None:
        """Read experts that are not resident, as many as the transient region takes, and forget them: to time reads."""
        with self.between_leases():
            entries = [entry for key in keys if (entry := self.cache.stage(key)) is not None]
            for entry in entries:
                self.demand(entry, precision)
            for entry in entries:
                assert entry.transfer is not None
                while not entry.transfer.finished:
                    self.scheduler.wait_any([entry.transfer])
                require_done(entry.transfer)
                self.settle(entry)
                self.drop_staged(entry)

    def stage_for_demand(self, key: ExpertKey) -> Slot | None:
        """A transient slot for an expert that is needed now, prefetches giving way; None: all hold needed experts."""
        entry = self.cache.stage(key)
        if entry is not None:
            return entry
        for staged in sorted(self.cache.staged(), key=lambda staged: staged.confidence):
            if staged.key not in self.cache.pinned:
                self.drop_staged(staged)
                if (entry := self.cache.stage(key)) is not None:
                    return entry
        return None

    def expire(self, routing: Routing) -> None:
        """Routing is known: prefetches for this layer that it does not confirm are dropped."""
        for entry in self.cache.staged():
            if entry.key.layer == routing.layer and entry.key.expert not in routing.pairs_per_expert:
                self.drop_staged(entry)

    def drop_prefetches(self) -> None:
        """No prefetch is read or staged any longer."""
        self.named.clear()
        self.ranking.clear()
        for entry in self.cache.staged():
            if entry.origin is Origin.PREFETCH and entry.key not in self.cache.pinned:
                self.drop_staged(entry)


class Lease:
    """Experts of one layer for one step. Iterate once, inside `with`; each yielded group is pinned until the next.

    The first group is what is resident, even if that is nothing; then come experts in order of arrival. What a layer
    needs beyond its share of slots passes through the transient region in waves. `complete` says whether the group
    yielded last was the last one.

    >>> with residency.lock, residency.begin(routing) as lease:
    ...     for group in lease:
    ...         compute([entry.slot for entry in group])

    Raises ChecksumError, StoreError, TransferError or ClosedError when an expert cannot be had.
    """

    def __init__(self, residency: Residency, routing: Routing) -> None:
        self.routing = routing
        self.stats = residency.accounting.of(routing)
        self.stalls: list[tuple[float, float]] = []
        self.last_use: User | None = None  # set it where kernels go on after they return: an event on a device
        self._residency = residency
        self._wanted: Mapping[int, Precision] = {}
        self._ready: list[Slot] = []
        self._waiting: list[Slot] = []
        self._overflow: deque[ExpertKey] = deque()

    def open(self) -> None:
        """Pin what is resident and demand the rest, the most popular first; `Residency.begin` calls this."""
        r, routing = self._residency, self.routing
        if r.cache.num_staged:
            r.expire(routing)
        found = self._found()
        if len(found) == len(routing.pairs_per_expert) and all(map(_is_settled, found.values())):
            self._keep_all(found)
            return
        missing = [e for e in routing.pairs_per_expert if e not in found or found[e].precision is not Precision.FULL]
        wanted = self._wanted = r.precision.choose(routing, missing)
        self._count(found)
        evictions = r.cache.evictions
        r.cache.pinned.update([entry.key for entry in found.values()])  # before any admission may evict them
        for entry in reversed(found.values()):  # so that the most popular is the most recent
            self._keep(entry, wanted[entry.key.expert])
        self._ready.reverse()
        if len(found) < len(wanted):
            for expert in routing.pairs_per_expert:
                if expert not in found:
                    self._load(ExpertKey(routing.layer, expert))
            self._admit_overflow()
            self.stats.evictions += r.cache.evictions - evictions

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._residency.end(self)

    @property
    def complete(self) -> bool:
        """Whether no expert is still to come."""
        return not self._waiting and not self._overflow

    def __iter__(self) -> Iterator[list[Slot]]:
        yield self._ready
        self._release(self._ready)
        while not self.complete:
            self._admit_overflow()
            if landed := self._landed():
                yield landed
                self._release(landed)
            else:
                self._stall()

    def _found(self) -> dict[int, Slot]:
        """The experts that are resident or on their way; a prefetch whose read failed counts as absent."""
        r, found = self._residency, {}
        resident = r.cache.resident(self.routing.layer)
        for expert in self.routing.pairs_per_expert:
            entry = resident.get(expert)
            if entry is not None and (entry.transfer is None or r.settle(entry)):
                found[expert] = entry
        return found

    def _keep_all(self, found: dict[int, Slot]) -> None:
        """Every expert is cached in full: each is a hit, and as nothing is read, nothing must be pinned."""
        r, routing, s = self._residency, self.routing, self.stats
        s.first_accesses += r.accounting.first_accesses(routing)
        s.accesses += len(found)
        s.hits += len(found)
        self._count_prediction()
        r.cache.touch_all(routing.layer, reversed(found))  # so that the most popular is the most recent
        self._ready = list(found.values())

    def _count(self, found: Mapping[int, Slot]) -> None:
        """One access for each expert. A hit is resident, at the precision wanted, when the layer asks."""
        routing, s, wanted = self.routing, self.stats, self._wanted
        s.first_accesses += self._residency.accounting.first_accesses(routing)
        named = self._count_prediction()
        s.accesses += len(routing.pairs_per_expert)
        for expert in routing.pairs_per_expert:
            entry = found.get(expert)
            if entry is None:
                s.uncached += 1
                s.covered += expert in named
                continue
            enough = entry.precision is not None and entry.precision >= wanted[expert]
            s.hits += enough
            if entry.origin is Origin.PREFETCH:
                s.uncached += 1
                s.covered += expert in named
                s.prefetch_hits += enough
                s.late_prefetches += not enough
                s.prefetch_used_bytes += self._prefetched_bytes(entry, wanted[expert])

    def _count_prediction(self) -> Set[int]:
        """What had been predicted for the layer."""
        routing, r = self.routing, self._residency
        named = r.named.pop(routing.layer, None)
        if not named:
            return frozenset()
        needed = routing.pairs_per_expert
        self.stats.asked += len(needed)
        self.stats.recalled += len(needed.keys() & r.ranking.pop(routing.layer)[: len(needed)])
        return named

    def _prefetched_bytes(self, entry: Slot, wanted: Precision) -> int:
        """What of a prefetch had been read before its layer was known to want it."""
        if entry.transfer is not None:
            return self._residency.scheduler.upgrade(entry.transfer)
        return self._residency.header.layout(entry.key.layer).span(None, entry.precision or wanted)[1]

    def _keep(self, entry: Slot, wanted: Precision) -> None:
        """A resident expert was asked for: order it in the cache, and bring it to the precision wanted."""
        r = self._residency
        entry.origin = Origin.DEMAND
        if entry.staged:
            r.cache.promote(entry)
        else:
            r.cache.touch(entry)
        if entry.precision is not None and entry.precision >= wanted:
            self._ready.append(entry)
            return
        self._waiting.append(entry)
        if entry.transfer is not None:
            r.scheduler.upgrade(entry.transfer)
        else:
            r.demand(entry, wanted, self.routing.prefill)

    def _load(self, key: ExpertKey) -> None:
        entry = self._residency.cache.admit(key)
        if entry is None:
            self._overflow.append(key)
        else:
            self._demand(entry)

    def _demand(self, entry: Slot) -> None:
        r = self._residency
        r.cache.pinned.add(entry.key)
        self._waiting.append(entry)
        r.demand(entry, self._wanted[entry.key.expert], self.routing.prefill)

    def _admit_overflow(self) -> None:
        """Start reading further experts through the transient region as far as it has room."""
        while self._overflow:
            entry = self._residency.stage_for_demand(self._overflow[0])
            if entry is None:
                return
            self._overflow.popleft()
            self._demand(entry)

    def _landed(self) -> list[Slot]:
        """What has arrived at the precision wanted; of a prefetch that was read to less, the rest is demanded."""
        landed: list[Slot] = []
        if not self._waiting:
            return landed
        for entry in [e for e in self._waiting if e.transfer is None or e.transfer.finished]:
            if entry.transfer is not None:
                require_done(entry.transfer)
                self._residency.settle(entry)
            wanted = self._wanted[entry.key.expert]
            if entry.precision is None or entry.precision < wanted:
                self._residency.demand(entry, wanted, self.routing.prefill)
            else:
                self._waiting.remove(entry)
                landed.append(entry)
        return landed

    def _stall(self) -> None:
        """Wait for a read: of an expert of ours, or one that keeps a slot we need."""
        r = self._residency
        pending = [e.transfer for e in self._waiting if e.transfer is not None] or r.cache.releasing()
        start = time.perf_counter()
        r.scheduler.wait_any(pending)
        end = time.perf_counter()
        self.stats.stall_s += end - start
        self.stalls.append((start, end))

    def _release(self, entries: list[Slot]) -> None:
        """Unpin; what only passed through leaves."""
        r = self._residency
        for entry in entries:
            entry.last_use = self.last_use
            r.cache.pinned.discard(entry.key)
            if entry.staged:
                r.drop_staged(entry)


def _is_settled(entry: Slot) -> bool:
    """Whether the expert is cached in full, so that its use changes nothing but the order of eviction."""
    return entry.precision is Precision.FULL and entry.transfer is None and not entry.staged
