"""What becomes of predictions, step by step, with reads that end when the test says so."""

import threading
from types import SimpleNamespace

import pytest

from fate.cache import POLICIES
from fate.cache.expert_cache import ExpertCache
from fate.core import ExpertKey, Precision, Prediction, Routing
from fate.engine.accounting import Accounting
from fate.engine.prefetch import Prefetcher
from fate.engine.residency import Residency
from fate.engine.switch import PrefetchSwitch
from fate.transfer.scheduler import State

EXPERT_BYTES = 10


class Reads:
    """A scheduler whose log says what was asked; nothing is read."""

    def __init__(self):
        self.log = []

    def demand(self, transfer):
        self.log.append(("demand", transfer.key))

    def prefetch(self, transfer):
        self.log.append(("prefetch", transfer.key))
        return True

    def cancel(self, transfer):
        self.log.append(("cancel", transfer.key))
        transfer.state = State.CANCELLED
        return True

    def upgrade(self, transfer):
        transfer.demand = True
        return 4  # bytes that had come by then

    def wait_any(self, transfers):
        for transfer in transfers:
            transfer.state = State.DONE

    def busy_s(self):
        return 0.0


class Predictor:
    """Says what the test tells it to."""

    def __init__(self):
        self.at_start, self.after = (), {}

    def begin_step(self, step):
        return self.at_start

    def predict(self, routing, gate_input):
        return self.after.get(routing.layer, ())


def choose(routing, missing):
    """All but the first missing expert of a prompt may do with INT2."""
    wanted = dict.fromkeys(routing.experts, Precision.FULL)
    if routing.prefill and routing.tokens > 4:
        wanted.update(dict.fromkeys(missing[1:], Precision.INT2))
    return wanted


class Engine:
    """Three layers of eight experts, one cached each, two transient slots."""

    def __init__(self):
        layout = SimpleNamespace(span=lambda held, wanted: (0, EXPERT_BYTES), depth=lambda wanted: wanted)
        header = SimpleNamespace(layers=[SimpleNamespace(num_experts=8)] * 3, layout=lambda layer: layout)
        self.cache = ExpertCache([8] * 3, [1, 1, 1], 2, POLICIES.get("lru"))
        self.reads, self.accounting, self.predictor = Reads(), Accounting(3), Predictor()
        precision = SimpleNamespace(choose=choose)
        self.residency = Residency(header, self.cache, self.reads, precision, self.accounting, threading.RLock())
        self.prefetch = Prefetcher(self.residency, PrefetchSwitch(lambda note: None, trial=False))
        self.prefetch.use(self.predictor)

    def predict(self, *predictions, prefill=False, tokens=1):
        """What a forward of layer 2 leaves behind whose predictor says this."""
        self.prefetch.begin_step(prefill, None)
        self.predictor.after = {2: predictions}
        self.prefetch.after_routing(Routing(2, {}, tokens, prefill), None)

    def staged(self):
        return {entry.key.expert: entry.transfer.precision for entry in self.cache.staged()}


@pytest.fixture
def engine():
    return Engine()


def test_routing_drops_what_it_does_not_confirm(engine):
    engine.predict(Prediction(0, ((3, 0.6), (5, 0.3))))
    with engine.residency.begin(Routing(0, {3: 1})) as lease:
        groups = [[entry.key.expert for entry in group] for group in lease]
    assert engine.reads.log == [
        ("prefetch", ExpertKey(0, 3)),
        ("prefetch", ExpertKey(0, 5)),
        ("cancel", ExpertKey(0, 5)),
    ]
    assert groups == [[], [3]]
    stats = engine.accounting.layers(False)[0]
    assert (stats.covered, stats.late_prefetches, stats.prefetch_used_bytes, stats.asked) == (1, 1, 4, 1)


def test_a_likelier_prefetch_takes_the_place_of_a_less_likely_one(engine):
    engine.predict(Prediction(0, ((1, 0.3), (2, 0.4))))
    engine.predict(Prediction(1, ((6, 0.9),)))
    assert set(engine.staged()) == {2, 6}


def test_a_predictor_may_speak_before_the_first_layer(engine):
    engine.predictor.at_start = [Prediction(0, ((4, 0.9),)), Prediction(2, ((7, 0.8),))]
    engine.prefetch.begin_step(False, None)
    assert engine.reads.log == [("prefetch", ExpertKey(0, 4)), ("prefetch", ExpertKey(2, 7))]


def test_a_prefetch_is_read_as_deep_as_its_layer_will_want_it(engine):
    """A prompt's by what is missing when it is made; what follows the prompt, in full."""
    engine.cache.admit(ExpertKey(1, 7)).precision = Precision.FULL
    engine.predict(Prediction(1, ((7, 1.0), (3, 0.9), (4, 0.8))), prefill=True, tokens=32)
    assert engine.staged() == {3: Precision.FULL, 4: Precision.INT2}


@pytest.mark.parametrize("before, after", [(True, True), (True, False), (False, True)])
def test_prefetches_of_another_phase_are_read_in_full(engine, before, after):
    """Those that find room only after the phase has changed."""
    held = [engine.cache.stage(ExpertKey(2, expert)) for expert in (0, 1)]
    engine.cache.pinned.update(entry.key for entry in held)
    engine.predict(Prediction(1, ((3, 0.9), (4, 0.8))), prefill=before, tokens=32)
    engine.prefetch.begin_step(after, None)
    engine.cache.pinned.clear()
    for entry in held:
        engine.cache.drop(entry)
    engine.prefetch.pump()
    both = before and after
    assert engine.staged() == {3: Precision.FULL, 4: Precision.INT2 if both else Precision.FULL}


def test_a_prefetch_read_to_less_than_its_layer_wants_is_completed(engine):
    """And keeps nothing else of the layer waiting meanwhile."""
    engine.predict(Prediction(1, ((3, 0.9), (4, 0.8))), prefill=True, tokens=32)
    engine.prefetch.begin_step(False, None)
    with engine.residency.begin(Routing(1, {4: 1, 6: 1})) as lease:
        demanded = [key.expert for kind, key in engine.reads.log if kind == "demand"]
        assert demanded == [6], "at once, though the prefetch has not arrived"
        groups = [[entry.key.expert for entry in group] for group in lease]
    assert groups == [[], [6], [4]]
    assert engine.reads.log[-1] == ("demand", ExpertKey(1, 4))
    assert engine.cache.lookup(1, 4).precision is Precision.FULL


def test_a_slot_that_a_device_still_uses_is_not_read_into(engine):
    """An event of a device says when its kernels have finished with a slot."""
    event = SimpleNamespace(finished=False)
    with engine.residency.begin(Routing(0, {3: 1})) as lease:
        lease.last_use = event
        for _ in lease:
            pass
    slot = engine.cache.lookup(0, 3).slot
    with engine.residency.begin(Routing(0, {4: 1})) as lease:
        (entry,) = [e for group in lease for e in group]
        assert entry.slot != slot, "it passes through the transient region"
    event.finished = True
    with engine.residency.begin(Routing(0, {5: 1})) as lease:
        (entry,) = [e for group in lease for e in group]
        assert entry.slot == slot
