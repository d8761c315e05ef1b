"""The slot table under arbitrary use: slots are never lost, shared or taken from under a pin."""

import dataclasses

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fate.cache import POLICIES, ExpertCache
from fate.core import ExpertKey


@dataclasses.dataclass
class Read:
    finished: bool = False


class SlotTable(RuleBasedStateMachine):
    """Admit, stage, promote, pin and drop at random on 3 layers of 6 experts."""

    divisions = (((3, 1, 2), 2), ((2, 1, 1), 4), ((2, 2, 3), 1))

    def __init__(self):
        super().__init__()
        self.cache = ExpertCache(*self.divisions[0], policy=POLICIES.get("lru"))
        self.held = {}
        self.draining = []

    keys = st.builds(ExpertKey, st.integers(0, 2), st.integers(0, 5))

    @rule(key=keys, staged=st.booleans(), reading=st.booleans())
    def enter(self, key, staged, reading):
        if self.cache.lookup(key) is not None:
            return
        pinned = {k for k, e in self.held.items() if k in self.cache.pinned or (e.transfer and not e.transfer.finished)}
        entry = self.cache.stage(key) if staged else self.cache.admit(key)
        self.held = {k: e for k, e in self.held.items() if self.cache.lookup(k) is e}
        assert pinned <= set(self.held), "a pinned expert was evicted"
        if entry is not None:
            entry.transfer = Read() if reading else None
            self.held[key] = entry

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def use(self, data):
        entry = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        if entry.staged:
            self.cache.promote(entry)
            self.held = {k: e for k, e in self.held.items() if self.cache.lookup(k) is e}
        else:
            self.cache.touch(entry)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data, pinned):
        key = data.draw(st.sampled_from(sorted(self.held)))
        self.cache.pinned.add(key) if pinned else self.cache.pinned.discard(key)

    @rule(division=st.sampled_from(divisions))
    def divide_otherwise(self, division):
        fixed = {k for k, e in self.held.items() if k in self.cache.pinned or (e.transfer and not e.transfer.finished)}
        staged = {e.key for e in self.cache.staged()}
        before = dict(self.held)
        done = self.cache.resize(*division)
        self.held = {k: e for k, e in self.held.items() if self.cache.lookup(k) is e}
        assert fixed | staged <= set(self.held)
        possible = len(staged) <= division[1] and all(
            len([k for k in fixed - staged if k.layer == layer]) <= capacity
            for layer, capacity in enumerate(division[0])
        )
        assert done == possible
        assert (self.cache.capacities, self.cache.transient) == division or (not done and before == self.held)

    @rule()
    def start_again(self):
        self.cache.clear()
        self.held, self.draining = {}, []

    @precondition(lambda self: self.held)
    @rule(data=st.data(), keep_slot=st.booleans())
    def drop(self, data, keep_slot):
        key = data.draw(st.sampled_from(sorted(self.held)))
        entry = self.held.pop(key)
        self.cache.pinned.discard(key)
        self.cache.drop(entry, keep_slot=keep_slot)
        if keep_slot:
            self.draining.append(entry.slot)

    @precondition(lambda self: self.draining)
    @rule()
    def drain(self):
        self.cache.free_slot(self.draining.pop())

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def land(self, data):
        entry = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        if entry.transfer:
            entry.transfer.finished = True

    @invariant()
    def every_slot_has_one_owner(self):
        slots = [e.slot for e in self.held.values()] + self.draining + self.cache._free
        assert sorted(slots) == list(range(self.cache.num_slots))

    @invariant()
    def shares_are_kept(self):
        staged = self.cache.staged()
        assert len(staged) <= self.cache.transient
        for layer, capacity in enumerate(self.cache.capacities):
            cached = [k for k, e in self.held.items() if k.layer == layer and not e.staged]
            assert len(cached) == self.cache.num_cached(layer) <= capacity


TestSlotTable = SlotTable.TestCase
TestSlotTable.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_promotion_moves_no_slot():
    cache = ExpertCache([1], transient=1, policy=POLICIES.get("lru"))
    old = cache.admit(ExpertKey(0, 0))
    guess = cache.stage(ExpertKey(0, 1))
    assert cache.promote(guess)
    assert (guess.slot, guess.staged) == (1, False)
    assert cache.lookup(old.key) is None
    assert cache.evictions == 1
    assert cache.stage(ExpertKey(0, 2)).slot == old.slot
