"""Residency: which experts are in which slots, which are on their way, which are guessed.

`begin(routing)` opens a *lease* (see `lease.py`) for a layer whose routing is known: guesses that it does not confirm
expire, resident experts are pinned, the others demanded at once. `guess(predictions)` takes a predictor's word on
later layers; `pump` stages the likeliest of them in the transient region as room appears. Only this package knows
both the cache and the predictor's output.

One lease is open at a time, under `ExpertManager.lock` while it is opened and used. One that does not end well (a
failed read, a KeyboardInterrupt anywhere) stays open; the next lease then starts from an empty cache. What changes
residency outside of a lease does so inside `between_leases`, with the same effect.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from fate.cache import Entry, ExpertCache
from fate.core import ExpertKey, Precision, Prediction, Routing, StepStats
from fate.errors import ClosedError
from fate.precision import PrecisionPolicy
from fate.store.format import StoreHeader
from fate.trace import Recorder, Timeline
from fate.transfer.scheduler import State, Transfer, TransferScheduler

if TYPE_CHECKING:
    from fate.engine.lease import Lease

Slot = Entry[Transfer]
LOAD_RATE = 0.2  # weight of the last step in the link's load
REPLACE_RATIO = 1.25  # how much likelier a guess must be to take the place of one that is staged


class ExpertManager:
    """Residency of the experts of one model. Hold `lock` around everything but `stats`."""

    def __init__(
        self,
        header: StoreHeader,
        cache: ExpertCache[Transfer],
        scheduler: TransferScheduler,
        precision: PrecisionPolicy,
    ) -> None:
        from fate.engine.lease import Lease  # it needs us

        self._lease_type = Lease
        self.header = header
        self.cache = cache
        self.scheduler = scheduler
        self.precision = precision
        self.lock = threading.RLock()
        self.timeline: Timeline | None = None
        self.recorder: Recorder | None = None
        self.lease: Lease | None = None  # the one that is open
        num_layers = len(header.layers)
        self._phases = {prefill: [StepStats() for _ in range(num_layers)] for prefill in (False, True)}
        self.prefill = True
        self.stats = self._phases[True]  # of the phase under way, by layer
        self.link_load = 0.0  # share of the last decoding steps in which the link was busy
        self._step_began: tuple[float, float] | None = None  # when, and the link's busy seconds by then
        self._closed = self._interrupted = False
        self._unsettled: list[Callable[[], None]] = []  # see `later`
        self._seen: list[set[int]] = [set() for _ in range(num_layers)]  # experts ever accessed
        self._num_experts = sum(layer.num_experts for layer in header.layers)
        self._named: dict[int, set[int]] = {}  # experts named for a layer since it last ran
        self._ranking: dict[int, tuple[int, ...]] = {}  # the last word on it
        self._wishes: dict[int, dict[int, float]] = {}  # layer -> expert -> confidence: to be staged
        self._depths: dict[int, Mapping[int, Precision]] = {}  # how deep wishes of a prompt are read
        self._draining: list[tuple[Transfer, int]] = []  # cancelled reads that still write to their slot

    def begin_phase(self, prefill: bool) -> None:
        """What follows is counted as a prompt's or as decoding."""
        self.settle_accounts()
        now, busy_s = time.perf_counter(), self.scheduler.busy_s()
        last = self._step_began
        if last is not None and not self.prefill and now > last[0]:
            share = (busy_s - last[1]) / (now - last[0])
            self.link_load += LOAD_RATE * (min(max(share, 0.0), 1.0) - self.link_load)
        self._step_began = None if prefill else (now, busy_s)
        self.prefill = prefill
        self.stats = self._phases[prefill]

    def layer_stats(self, prefill: bool) -> list[StepStats]:
        """Counters of each layer in one phase since loading."""
        self.settle_accounts()
        return [replace(stats) for stats in self._phases[prefill]]

    def meter(self, transfer: Transfer, guessed_bytes: int, demanded_bytes: int) -> None:
        """The scheduler's report of bytes that arrived."""
        stats = self.stats[transfer.key.layer]
        stats.prefetch_bytes += guessed_bytes
        stats.demand_bytes += demanded_bytes
        if transfer.offset:
            stats.upgrade_bytes += guessed_bytes + demanded_bytes

    def incomplete(self, layer: int) -> bool:
        """Whether `layer` has experts that are not cached: only then is a guess worth making."""
        return self.cache.num_cached(layer) < self.header.layers[layer].num_experts

    @property
    def all_cached(self) -> bool:
        """Whether there is nothing left that could be guessed."""
        return self.cache.num_all_cached == self._num_experts

    def close(self) -> None:
        """Stop the transfers once no lease is in use; later leases raise ClosedError."""
        with self.lock:
            try:
                self.settle_accounts()
            finally:
                self._closed = True
                self.scheduler.close()

    def begin(self, routing: Routing) -> Lease:
        """Open a lease on the experts of `routing`, from an empty cache if the last one did not end well."""
        if self._closed:
            raise ClosedError()
        self.settle_accounts()
        if not self.sound:
            self.scheduler.quiesce()
            self._draining.clear()
            self._forget_guesses()
            self.cache.clear()
        lease = self.lease = self._lease_type(self, routing)
        self._interrupted = False
        self.reap()
        lease.open()
        return lease

    def take_whole(self, routing: Routing) -> list[Slot] | None:
        """The entries of a layer whose experts are all cached whole, accessed by this; None, and nothing is changed,
        for any other. Under the lock nothing is evicted or read until the lease has ended, so nothing is pinned."""
        entries = self.cache.whole(routing.layer, routing.experts)
        if entries is not None:
            self.expire(routing)
            for entry in reversed(entries):  # so that the most popular is the most recent
                self.cache.touch(entry)
            s = self.stats[routing.layer]
            self._count_words(routing, s)
            s.accesses += len(entries)
            s.hits += len(entries)
        return entries

    def later(self, account: Callable[[], None]) -> None:
        """Account for a use of experts that `ExpertCache.whole_slots` named while it was `ready` (by `use_whole`), but
        only before anything else changes residency or wants to see the counters. One account after another takes a
        fraction of what it takes between kernels, whose weights push the interpreter out of the processor's cache."""
        self._unsettled.append(account)
        if len(self._unsettled) > len(self.header.layers):  # a caller of the inner model alone never ends a step
            self.settle_accounts()

    def settle_accounts(self) -> None:
        """Do what was put off."""
        if not self._unsettled:
            return
        with self.lock:
            accounts, self._unsettled = self._unsettled, []
            if self.sound:
                self._interrupted = True
                for account in accounts:
                    account()
                self._interrupted = False

    def use_whole(self, routing: Routing) -> None:
        """A lease that was begun and ended, as an account."""
        self.reap()
        self.take_whole(routing)
        if not self._closed:
            self.pump()

    def end(self, lease: Lease) -> None:
        """The lease ended well."""
        if self.lease is lease:
            self.cache.pinned.clear()
            self.lease = None

    @property
    def sound(self) -> bool:
        """Between two leases: whether all that was done to residency ended well."""
        return self.lease is None and not self._interrupted

    @property
    def ready(self) -> bool:
        """Whether the next lease neither is refused nor starts from an empty cache."""
        return self.sound and not self._closed

    @contextmanager
    def between_leases(self) -> Iterator[None]:
        """Around changes of residency while no lease is open; only where it is `sound`."""
        self.settle_accounts()
        self._interrupted = True
        yield
        self._interrupted = False

    def demand_early(self, routing: Routing) -> None:
        """What a lease on `routing` will probably ask for soon: read what is missing, as far as the transient region
        has room. Nothing is accessed by that: the cache and the counters wait for the lease."""
        self.expire(routing)
        found = [self.cache.lookup(ExpertKey(routing.layer, expert)) for expert in routing.experts]
        missing = [expert for expert, entry in zip(routing.experts, found, strict=True) if entry is None]
        wanted = self.precision.choose(routing, missing)
        for expert, entry in zip(routing.experts, found, strict=True):
            if entry is not None:
                entry.confidence = math.inf  # as a guess it is confirmed: none takes its place
                if entry.transfer is not None and not entry.transfer.finished:
                    entry.guessed_bytes = self.scheduler.upgrade(entry.transfer)
            elif (entry := self.stage_for_demand(ExpertKey(routing.layer, expert), early=True)) is not None:
                entry.early, entry.confidence = True, math.inf
                self.demand(entry, wanted[expert])
            else:
                return

    def guess(self, predictions: Iterable[Prediction], tokens: int = 1) -> None:
        """Take a predictor's word on layers to come, instead of its earlier one, and stage what there is room for.
        tokens: of the forward they were made in."""
        for prediction in predictions:
            layer = prediction.layer
            self._named.setdefault(layer, set()).update(prediction.experts)
            self._ranking[layer] = prediction.experts
            wishes = {expert: confidence for expert, confidence in prediction.ranked if confidence > 0}
            self._wishes[layer] = wishes
            self._depths.pop(layer, None)
            if self.prefill:
                self._depths[layer] = self._foreseen(prediction, tokens)
            self._revise(layer, wishes)
        self.pump()

    def _foreseen(self, prediction: Prediction, tokens: int) -> Mapping[int, Precision]:
        """What the layer will want of the experts named, if its routing is what was foretold."""
        routing = Routing(prediction.layer, dict.fromkeys(prediction.experts, 1), tokens, prefill=True)
        return self.precision.choose(routing, [e for e in routing.experts if not self._is_whole(routing.layer, e)])

    def _is_whole(self, layer: int, expert: int) -> bool:
        entry = self.cache.lookup(ExpertKey(layer, expert))
        return entry is not None and entry.precision is Precision.FULL

    def _revise(self, layer: int, wishes: dict[int, float]) -> None:
        """Earlier guesses for the layer get their new confidence; one that is no longer named is not read further."""
        for entry in self.cache.staged():
            if entry.key.layer != layer or not entry.prefetched:
                continue
            entry.confidence = wishes.get(entry.key.expert, 0.0)
            if entry.transfer is not None:
                entry.transfer.confidence = entry.confidence
                if entry.key.expert not in wishes:
                    self.drop_staged(entry)

    def pump(self) -> None:
        """Stage what is wished for, the likeliest first, while there is room and the byte cap allows."""
        if not self._wishes:
            return
        wishes = [(c, ExpertKey(layer, e)) for layer, experts in self._wishes.items() for e, c in experts.items()]
        for confidence, key in sorted(wishes, key=lambda wish: -wish[0]):
            entry = self.cache.lookup(key)
            if entry is None and not self._stage_guess(key, confidence):
                return
            if entry is not None and not self._guess_upgrade(entry, confidence):
                return
            del self._wishes[key.layer][key.expert]

    def _stage_guess(self, key: ExpertKey, confidence: float) -> bool:
        self.reap()
        entry = self.cache.stage(key)
        if entry is None and (weaker := self._weakest_guess(confidence / REPLACE_RATIO)) is not None:
            self.drop_staged(weaker)
            entry = self.cache.stage(key)
        if entry is None:
            return False
        entry.prefetched, entry.confidence = True, confidence
        if self._send_guess(entry, confidence):
            return True
        self.cache.drop(entry)
        return False

    def _guess_upgrade(self, entry: Slot, confidence: float) -> bool:
        """What is cached at less than decoding wants may be completed ahead of time."""
        settled = entry.transfer is None and entry.precision is not None and not entry.staged
        if not settled or self.prefill or entry.precision is Precision.FULL:
            return True
        return self._wanted(entry.key) is Precision.INT2 or self._send_guess(entry, confidence)

    def _send_guess(self, entry: Slot, confidence: float) -> bool:
        transfer = self._transfer(entry, self._wanted(entry.key))
        transfer.demand, transfer.confidence = False, confidence
        entry.transfer = transfer
        if self.scheduler.prefetch(transfer):
            return True
        entry.transfer = None
        return False

    def _wanted(self, key: ExpertKey) -> Precision:
        """How deep a guess is read."""
        if self.prefill and (foreseen := self._depths.get(key.layer)) is not None:
            return foreseen[key.expert]
        return self.precision.choose(Routing(key.layer, {key.expert: 1}), ())[key.expert]

    def _weakest_guess(self, below: float) -> Slot | None:
        guesses = [e for e in self.cache.staged() if e.prefetched and e.key not in self.cache.pinned]
        weakest = min(guesses, key=lambda entry: entry.confidence, default=None)
        return weakest if weakest is not None and weakest.confidence < below else None

    def expire(self, routing: Routing) -> None:
        """Routing is known: guesses for this layer that it did not confirm go, and so do wishes."""
        self._wishes.pop(routing.layer, None)
        self._depths.pop(routing.layer, None)
        for entry in self.cache.staged():
            if entry.key.layer == routing.layer and entry.key.expert not in routing.pairs_per_expert:
                self.drop_staged(entry)

    def drop_guesses(self) -> None:
        """No guess is read, staged or wished for any longer."""
        self._forget_guesses()
        for entry in self.cache.staged():
            if entry.prefetched and entry.key not in self.cache.pinned:
                self.drop_staged(entry)

    def _forget_guesses(self) -> None:
        self._named.clear()
        self._ranking.clear()
        self._wishes.clear()
        self._depths.clear()

    def demand(self, entry: Slot, wanted: Precision) -> None:
        """Queue the read that brings `entry` from what it holds to `wanted`."""
        entry.transfer = self._transfer(entry, wanted)
        self.scheduler.demand(entry.transfer)

    def settle(self, entry: Slot) -> bool:
        """Take note of a finished read; False (and the entry is gone) if it leaves nothing."""
        transfer = entry.transfer
        if transfer is None or not transfer.finished:
            return True
        entry.transfer = None
        if transfer.state is State.DONE:
            entry.precision = transfer.precision
            self.cache.settled(entry)
        elif entry.precision is None or transfer.state is State.FAILED:
            self.cache.drop(entry)
            return False
        return True

    def drop_staged(self, entry: Slot) -> None:
        """Forget a transient expert; its slot comes back at once, or when the read in it has stopped."""
        if entry.transfer is None or self.scheduler.cancel(entry.transfer):
            self.cache.drop(entry)
        else:
            self.cache.drop(entry, keep_slot=True)
            self._draining.append((entry.transfer, entry.slot))

    def stage_for_demand(self, key: ExpertKey, *, early: bool = False) -> Slot | None:
        """A transient slot for an expert that is needed now, guesses giving way. early: routing is known, but no lease
        has pinned what it needs, which is all that the layer has staged. None: all hold needed experts."""
        self.reap()
        entry = self.cache.stage(key)
        if entry is not None:
            return entry
        for guess in sorted(self.cache.staged(), key=lambda staged: staged.confidence):
            if guess.key not in self.cache.pinned and not (early and guess.key.layer == key.layer):
                self.drop_staged(guess)
                if (entry := self.cache.stage(key)) is not None:
                    return entry
        return None

    def draining(self) -> list[Transfer]:
        return [transfer for transfer, _ in self._draining]

    def reap(self) -> None:
        """Take back slots whose cancelled reads have stopped."""
        if not self._draining:
            return
        still = []
        for transfer, slot in self._draining:
            if transfer.finished:
                self.cache.free_slot(slot)
            else:
                still.append((transfer, slot))
        self._draining = still

    def count_accesses(self, routing: Routing, found: dict[int, Slot], wanted: Sequence[Precision]) -> None:
        """One access per expert of `routing`; `found`: those resident, landed or not, when the layer asked."""
        s = self.stats[routing.layer]
        named = self._count_words(routing, s)
        for expert, precision in zip(routing.experts, wanted, strict=True):
            entry = found.get(expert)
            s.accesses += 1
            enough = entry is not None and entry.precision is not None and entry.precision >= precision
            s.hits += enough
            if entry is not None and not entry.prefetched:
                continue
            s.uncached += 1
            s.covered += expert in named
            if entry is not None:
                s.prefetch_hits += enough
                s.late_prefetches += not enough
                s.prefetch_used_bytes += self._guessed_bytes(entry, precision)

    def _count_words(self, routing: Routing, s: StepStats) -> Collection[int]:
        """What the predictor had named for the layer, and what is accessed for the first time."""
        seen = self._seen[routing.layer]
        if not seen.issuperset(routing.experts):
            s.first_accesses += len(set(routing.experts) - seen)
            seen.update(routing.experts)
        named = self._named.pop(routing.layer, frozenset[int]())
        first_k = self._ranking.pop(routing.layer, ())[: len(routing.experts)]
        if named:
            s.asked += len(routing.experts)
            s.recalled += sum(expert in first_k for expert in routing.experts)
        return named

    def _guessed_bytes(self, entry: Slot, wanted: Precision) -> int:
        """What of a guess had been read before a layer was known to want it."""
        if entry.guessed_bytes is not None:
            return entry.guessed_bytes
        if entry.transfer is not None:
            return self.scheduler.upgrade(entry.transfer)
        return self.header.layout(entry.key.layer).span(None, entry.precision or wanted)[1]

    def _transfer(self, entry: Slot, wanted: Precision) -> Transfer:
        span = self.header.layout(entry.key.layer).span(entry.precision, wanted)
        return Transfer(entry.key, entry.slot, *span, precision=wanted)
