"""The slot table under arbitrary use: slots are never lost, shared or taken from under a pin."""

import dataclasses

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fate.cache import POLICIES, ExpertCache
from fate.cache.expert_cache import State
from fate.core import ExpertKey


@dataclasses.dataclass
class Read:
    finished: bool = False


class SlotTable(RuleBasedStateMachine):
    """Admit, stage, promote, pin and drop at random on 3 layers of 6 experts."""

    shared = False

    def __init__(self):
        super().__init__()
        self.cache = ExpertCache([6] * 3, (3, 1, 2), 2, POLICIES.get("lru"), shared=self.shared)
        self.held = {}
        self.dropped = []  # while somebody still uses their slots

    keys = st.builds(ExpertKey, st.integers(0, 2), st.integers(0, 5))

    def still_there(self):
        return {key: entry for key, entry in self.held.items() if self.cache.lookup(*key) is entry}

    @rule(key=keys, staged=st.booleans(), reading=st.booleans())
    def enter(self, key, staged, reading):
        if self.cache.lookup(*key) is not None:
            return
        fixed = {k for k, e in self.held.items() if k in self.cache.pinned or e.in_use}
        entry = self.cache.stage(key) if staged else self.cache.admit(key)
        self.held = self.still_there()
        assert fixed <= set(self.held), "a pinned expert was evicted"
        if entry is not None:
            entry.transfer = Read() if reading else None
            assert entry.state is (State.LOADING if reading else State.READY)
            self.held[key] = entry

    @precondition(lambda self: self.held)
    @rule(data=st.data(), on_a_device=st.booleans())
    def use(self, data, on_a_device):
        entry = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        if entry.staged:
            self.cache.promote(entry)
            self.held = self.still_there()
        else:
            self.cache.touch(entry)
        entry.last_use = Read() if on_a_device else None

    @precondition(lambda self: self.held)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data, pinned):
        key = data.draw(st.sampled_from(sorted(self.held)))
        self.cache.pinned.add(key) if pinned else self.cache.pinned.discard(key)

    @rule()
    def start_again(self):
        self.cache.clear()
        self.held, self.dropped = {}, []

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data):
        entry = self.held.pop(data.draw(st.sampled_from(sorted(self.held))))
        self.cache.pinned.discard(entry.key)
        self.cache.drop(entry)
        self.dropped.append(entry)

    @precondition(lambda self: self.held or self.dropped)
    @rule(data=st.data())
    def finish(self, data):
        entry = data.draw(st.sampled_from([*self.held.values(), *self.dropped]))
        for user in (entry.transfer, entry.last_use):
            if user is not None:
                user.finished = True
        self.cache.reap()

    @invariant()
    def every_slot_has_one_owner(self):
        """As many are free as nobody holds: so many can be staged, and none of them is in use."""
        self.dropped = [entry for entry in self.dropped if entry.in_use]
        slots = [entry.slot for entry in (*self.held.values(), *self.dropped)]
        assert len(set(slots)) == len(slots)
        assert set(slots) <= set(range(self.cache.num_slots))
        room = self.cache.transient - len(self.cache.staged())
        assert self.cache.can_stage == (room > 0 and len(slots) < self.cache.num_slots)

    @invariant()
    def shares_are_kept(self):
        assert len(self.cache.staged()) <= self.cache.transient
        cached = [[k for k, e in self.held.items() if k.layer == layer and not e.staged] for layer in range(3)]
        assert [len(keys) for keys in cached] == [self.cache.num_cached(layer) for layer in range(3)]
        if self.shared:
            assert sum(map(len, cached)) == self.cache.num_all_cached <= sum(self.cache.capacities)
        else:
            assert all(len(keys) <= capacity for keys, capacity in zip(cached, self.cache.capacities))


class SharedSlotTable(SlotTable):
    """All layers in one pool."""

    shared = True


TestSlotTable = SlotTable.TestCase
TestSharedSlotTable = SharedSlotTable.TestCase
for case in (TestSlotTable, TestSharedSlotTable):
    case.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_promotion_moves_no_slot():
    cache = ExpertCache([3], [1], transient=1, policy=POLICIES.get("lru"))
    old = cache.admit(ExpertKey(0, 0))
    prefetch = cache.stage(ExpertKey(0, 1))
    assert cache.promote(prefetch)
    assert (prefetch.slot, prefetch.staged) == (1, False)
    assert cache.lookup(*old.key) is None
    assert cache.evictions == 1
    assert cache.stage(ExpertKey(0, 2)).slot == old.slot


def test_layers_that_share_a_pool_take_slots_from_one_another():
    cache = ExpertCache([4, 4], [1, 1], transient=1, policy=POLICIES.get("lru"), shared=True)
    first, second = cache.admit(ExpertKey(0, 0)), cache.admit(ExpertKey(0, 1))
    assert cache.num_cached(0) == 2
    third = cache.admit(ExpertKey(1, 0))
    assert third.slot == first.slot
    assert cache.lookup(0, 0) is None
    assert cache.lookup(0, 1) is second
    assert (cache.num_cached(0), cache.num_cached(1)) == (1, 1)
