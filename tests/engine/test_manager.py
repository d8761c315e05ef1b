"""What an early word of the router does to guesses, step by step, with reads that end when the test says so."""

from types import SimpleNamespace

import pytest

from fate.cache import POLICIES
from fate.cache.expert_cache import ExpertCache
from fate.core import ExpertKey, Precision, Prediction, Routing
from fate.engine.manager import ExpertManager
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
        return True

    def upgrade(self, transfer):
        transfer.demand = True
        return 4  # bytes that had come by then

    def busy_s(self):
        return 0.0


def choose(routing, missing):
    """All but the first missing expert of a prompt may do with INT2."""
    wanted = dict.fromkeys(routing.experts, Precision.FULL)
    if routing.prefill and routing.tokens > 4:
        wanted.update(dict.fromkeys(missing[1:], Precision.INT2))
    return wanted


@pytest.fixture
def manager():
    """Three layers of eight experts, one cached each, two transient slots."""
    layout = SimpleNamespace(span=lambda held, wanted: (0, EXPERT_BYTES))
    header = SimpleNamespace(layers=[SimpleNamespace(num_experts=8)] * 3, layout=lambda layer: layout)
    precision = SimpleNamespace(choose=choose)
    return ExpertManager(header, ExpertCache([1, 1, 1], 2, POLICIES.get("lru")), Reads(), precision)


def early(manager, routing, *predictions):
    with manager.between_leases():
        manager.demand_early(routing)
        manager.guess(predictions)


def test_a_guess_that_an_early_word_confirms_stays(manager):
    """However likely guesses of later layers are, and although a sibling needs a slot too."""
    manager.guess([Prediction(0, ((3, 0.3),))])
    early(manager, Routing(0, {3: 1, 4: 1}), Prediction(1, ((5, 0.9),)))
    assert manager.scheduler.log == [("prefetch", ExpertKey(0, 3)), ("demand", ExpertKey(0, 4))]
    assert {entry.key.expert for entry in manager.cache.staged()} == {3, 4}


def test_what_was_guessed_of_an_expert_is_what_had_come_before_the_early_word(manager):
    manager.guess([Prediction(0, ((3, 0.3),))])
    early(manager, Routing(0, {3: 1}))
    entry = manager.cache.lookup(ExpertKey(0, 3))
    entry.transfer.state = State.DONE
    manager.meter(entry.transfer, 4, EXPERT_BYTES - 4)
    manager.begin(Routing(0, {3: 1}))
    stats = manager.stats[0]
    assert (stats.prefetch_bytes, stats.prefetch_used_bytes, stats.wasted_bytes) == (4, 4, 0)


def test_a_guess_is_read_as_deep_as_its_layer_will_want_it(manager):
    """A prompt's by what is missing when it is made; what follows the prompt, whole."""
    manager.cache.admit(ExpertKey(1, 7)).precision = Precision.FULL
    manager.begin_phase(prefill=True)
    manager.guess([Prediction(1, ((7, 1.0), (3, 0.9), (4, 0.8)))], tokens=32)
    depths = {entry.key.expert: entry.transfer.precision for entry in manager.cache.staged()}
    assert depths == {3: Precision.FULL, 4: Precision.INT2}


def test_guesses_of_another_phase_are_read_whole(manager):
    """Wishes that find room only after the phase has changed."""

    def staged_when_room_comes(before, after):
        held = [manager.cache.stage(ExpertKey(2, expert)) for expert in (0, 1)]
        for entry in held:
            manager.cache.pinned.add(entry.key)
        manager.begin_phase(prefill=before)
        manager.guess([Prediction(1, ((3, 0.9), (4, 0.8)))], tokens=32)
        manager.begin_phase(prefill=after)
        for entry in held:
            manager.cache.pinned.discard(entry.key)
            manager.cache.drop(entry)
        assert not list(manager.cache.staged())
        manager.pump()
        found = {entry.key.expert: entry.transfer.precision for entry in manager.cache.staged()}
        manager.drop_guesses()
        return found

    whole = {3: Precision.FULL, 4: Precision.FULL}
    assert staged_when_room_comes(before=True, after=True) == {**whole, 4: Precision.INT2}
    assert staged_when_room_comes(before=True, after=False) == whole
    assert staged_when_room_comes(before=False, after=True) == whole


def test_a_guess_read_to_less_than_its_layer_wants_is_completed(manager):
    """And keeps nothing else of the layer waiting meanwhile."""
    manager.begin_phase(prefill=True)
    manager.guess([Prediction(1, ((3, 0.9), (4, 0.8)))], tokens=32)
    manager.begin_phase(prefill=False)
    manager.scheduler.wait_any = lambda transfers: [setattr(each, "state", State.DONE) for each in transfers]
    with manager.begin(Routing(1, {4: 1, 6: 1})) as lease:
        demanded = [key.expert for kind, key in manager.scheduler.log if kind == "demand"]
        assert demanded == [6], "at once, though the guess has not arrived"
        groups = [[entry.key.expert for entry in group] for group in lease]
    assert groups == [[6], [4]]
    assert manager.scheduler.log[-1] == ("demand", ExpertKey(1, 4))
    assert manager.cache.lookup(ExpertKey(1, 4)).precision is Precision.FULL
