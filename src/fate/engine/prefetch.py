"""Prefetching: what a predictor expects becomes reads, as far as the link is idle and the transient region has room.

The likeliest expert of all layers goes first. A layer's new prediction replaces the one before it: what is staged gets
its new confidence, and what is no longer named is dropped. This is the only file that knows both the predictor and
residency.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fate.cache.expert_cache import Origin
from fate.core import ExpertKey, Precision, Prediction, Routing
from fate.engine.residency import Residency, Slot
from fate.engine.switch import PrefetchSwitch
from fate.predict import Predictor

REPLACE_RATIO = 1.25  # how much likelier a prefetch must be to take the place of one that is staged
LOAD_RATE = 0.2  # weight of the last step in the link's load


class Prefetcher:
    """Prefetches for one engine. Hold the residency's lock around every call.

    link_load: the share of the last decoding steps in which the link was busy.
    """

    def __init__(self, residency: Residency, switch: PrefetchSwitch) -> None:
        self.link_load = 0.0
        self._residency = residency
        self._switch = switch
        self._predictor: Predictor | None = None
        self._wishes: dict[int, dict[int, float]] = {}  # layer -> expert -> confidence: to be staged
        self._depths: dict[int, Mapping[int, Precision]] = {}  # how deep a prompt's wishes are read
        self._prefill = True
        self._step_began: tuple[float, float] | None = None  # when, and the link's busy seconds by then

    def use(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def begin_step(self, prefill: bool, step: Any) -> None:
        """A forward begins. A predictor that knows the whole token at once speaks now."""
        now, busy_s = time.perf_counter(), self._residency.scheduler.busy_s()
        if self._step_began is not None and now > self._step_began[0]:
            share = (busy_s - self._step_began[1]) / (now - self._step_began[0])
            self.link_load += LOAD_RATE * (min(max(share, 0.0), 1.0) - self.link_load)
        self._step_began = None if prefill else (now, busy_s)
        self._prefill = prefill
        if self._active and self._predictor is not None and (named := self._predictor.begin_step(step)):
            for prediction in named:
                self._take(prediction, 1)
            self.pump()

    @property
    def _active(self) -> bool:
        return self._switch.on and not self._residency.all_cached

    def after_routing(self, routing: Routing, gate_input: Any) -> tuple[float, float] | None:
        """A layer's demands are queued: prefetch for the layers after it. When the predictor worked, seconds."""
        self._wishes.pop(routing.layer, None)
        self._depths.pop(routing.layer, None)
        if self._predictor is None or not self._active:
            return None
        start = time.perf_counter()
        for prediction in self._predictor.predict(routing, gate_input):
            self._take(prediction, routing.tokens)
        self.pump()
        return start, time.perf_counter()

    def _take(self, prediction: Prediction, tokens: int) -> None:
        """Replace what was predicted for the layer before."""
        residency, (layer, ranked) = self._residency, prediction
        residency.ranking[layer] = experts = prediction.experts
        residency.named.setdefault(layer, set()).update(experts)
        wishes = {expert: confidence for expert, confidence in ranked if confidence > 0}
        if wishes:
            self._wishes[layer] = wishes
        else:
            self._wishes.pop(layer, None)
        self._depths.pop(layer, None)
        if self._prefill:
            routing = Routing(layer, dict.fromkeys(experts, 1), tokens, prefill=True)
            missing = [expert for expert in experts if not self._is_full(layer, expert)]
            self._depths[layer] = residency.precision.choose(routing, missing)
        if residency.cache.num_staged:
            for entry in residency.cache.staged():
                if entry.key.layer == layer and entry.origin is Origin.PREFETCH:
                    self._revise(entry, wishes)

    def _is_full(self, layer: int, expert: int) -> bool:
        entry = self._residency.cache.lookup(layer, expert)
        return entry is not None and entry.precision is Precision.FULL

    def _revise(self, entry: Slot, wishes: Mapping[int, float]) -> None:
        entry.confidence = wishes.get(entry.key.expert, 0.0)
        if entry.transfer is not None:
            entry.transfer.confidence = entry.confidence
            if entry.key.expert not in wishes:
                self._residency.drop_staged(entry)

    def pump(self) -> None:
        """Stage what is wished for, the likeliest first, while there is room and the byte cap allows."""
        cache = self._residency.cache
        wishes = [(c, layer, e) for layer, experts in self._wishes.items() for e, c in experts.items()]
        if not wishes or not (cache.can_stage or self._weakest(max(wishes)[0] / REPLACE_RATIO)):
            return
        wishes.sort(reverse=True)
        for confidence, layer, expert in wishes:
            entry = cache.lookup(layer, expert)
            if entry is None:
                done = self._stage(ExpertKey(layer, expert), confidence)
            else:
                done = self._upgrade(entry, confidence)
            if not done:
                return
            del self._wishes[layer][expert]

    def _stage(self, key: ExpertKey, confidence: float) -> bool:
        cache = self._residency.cache
        if not cache.can_stage:
            weaker = self._weakest(confidence / REPLACE_RATIO)
            if weaker is None:
                return False
            self._residency.drop_staged(weaker)
        entry = cache.stage(key)
        if entry is None:
            return False
        entry.origin, entry.confidence = Origin.PREFETCH, confidence
        if self._send(entry, confidence):
            return True
        cache.drop(entry)
        return False

    def _weakest(self, below: float) -> Slot | None:
        cache = self._residency.cache
        staged = [e for e in cache.staged() if e.origin is Origin.PREFETCH and e.key not in cache.pinned]
        weakest = min(staged, key=lambda entry: entry.confidence, default=None)
        return weakest if weakest is not None and weakest.confidence < below else None

    def _upgrade(self, entry: Slot, confidence: float) -> bool:
        """What is cached at less than decoding wants is completed ahead of time."""
        settled = entry.transfer is None and entry.precision is not None and not entry.staged
        if not settled or self._prefill or entry.precision is Precision.FULL:
            return True
        return self._depth(entry.key) is Precision.INT2 or self._send(entry, confidence)

    def _send(self, entry: Slot, confidence: float) -> bool:
        transfer = self._residency.transfer_to(entry, self._depth(entry.key), demand=False, prefill=self._prefill)
        transfer.confidence = confidence
        entry.transfer = transfer
        if self._residency.scheduler.prefetch(transfer):
            return True
        entry.transfer = None
        return False

    def _depth(self, key: ExpertKey) -> Precision:
        """How deep a prefetch is read."""
        if self._prefill and (depths := self._depths.get(key.layer)) is not None:
            return depths[key.expert]
        return self._residency.precision.choose(Routing(key.layer, {key.expert: 1}), ())[key.expert]
