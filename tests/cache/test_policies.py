"""Conformance of every registered eviction policy, and golden miss counts on a fixed trace."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from fate.cache import POLICIES
from fate.errors import UnknownNameError

# Misses of each policy on `zipf_trace`, by capacity. A changed number means a changed policy. lru: as
# functools.lru_cache counts them. arc: as `PaperARC` counts them.
GOLDEN = {
    "activation-aware": {4: 3212, 8: 2721, 16: 1977, 32: 1045},
    "arc": {4: 2685, 8: 2180, 16: 1503, 32: 787},
    "lrfu": {4: 2619, 8: 2054, 16: 1421, 32: 747},
    "lru": {4: 2984, 8: 2348, 16: 1581, 32: 792},
}


def zipf_trace(length=4000, experts=60, seed=7):
    """Skewed accesses with drifting popularity: what a layer's routing looks like."""
    rng = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(experts)]
    trace = []
    for step in range(length):
        if step % 500 == 0:
            order = rng.sample(range(experts), experts)
        trace.append(order[rng.choices(range(experts), weights)[0]])
    return trace


def misses(policy, trace, cached=()):
    """The shared get-loop; the policy holds `cached`."""
    cached, count = set(cached), 0
    for expert in trace:
        if expert in cached:
            policy.on_hit(expert)
            continue
        count += 1
        policy.on_miss(expert)
        if len(cached) == policy.capacity:
            victim = policy.victim(())
            assert victim in cached
            policy.on_evict(victim)
            cached.remove(victim)
        policy.on_insert(expert)
        cached.add(expert)
    return count


@pytest.mark.parametrize("name", POLICIES.names())
def test_golden_miss_counts(name):
    counts = {capacity: misses(POLICIES.get(name)(capacity), zipf_trace()) for capacity in (4, 8, 16, 32)}
    assert counts == GOLDEN[name]


@pytest.mark.parametrize("name", POLICIES.names())
def test_misses_lie_between_compulsory_and_all(name):
    trace = zipf_trace(600)
    assert misses(POLICIES.get(name)(60), trace) == len(set(trace))


@pytest.mark.parametrize("name", POLICIES.names())
def test_never_a_pinned_victim(name):
    policy = POLICIES.get(name)(4)
    for expert in range(4):
        policy.on_insert(expert)
    assert policy.victim({0, 1, 3}) == 2
    assert policy.victim({0, 1, 2, 3}) is None
    assert policy.victim({0, 1, 3}) == 2, "asking changes nothing"


def test_lru_order():
    policy = POLICIES.get("lru")(3)
    for expert in (1, 2, 3):
        policy.on_insert(expert)
    policy.on_hit(1)
    assert policy.victim(()) == 2
    policy.on_evict(2)
    assert policy.victim(()) == 3


def test_lrfu_fades_by_half_in_two_capacities():
    policy = POLICIES.get("lrfu")(4)
    for expert in (1, 2):
        policy.on_insert(expert)
        policy.on_hit(expert)
    for expert in (3, 4):
        policy.on_insert(expert)
    assert policy.victim(()) == 3, "used once, longer ago than 4"
    for _ in range(5):
        policy.on_hit(3)
    assert policy.victim(()) == 4
    for _ in range(40):
        policy.on_hit(3)
    policy.on_hit(4)
    assert policy.victim(()) == 1, "two accesses five half-lives ago are less than one of now"
    policy.on_evict(1)
    policy.on_insert(1)
    assert policy.victim(()) == 2


def test_lrfu_lets_a_new_request_outweigh_the_one_before():
    policy = POLICIES.get("lrfu")(2)
    for expert in (1, 2):
        policy.on_insert(expert)
    for _ in range(3):
        policy.on_hit(1)
    policy.on_hit(2)
    assert policy.victim(()) == 2
    policy.begin_request()
    policy.on_hit(2)
    assert policy.victim(()) == 1


def test_lrfu_is_the_papers_sum():
    """Its combined recency and frequency: the sum over accesses of 2 ** (-age / half-life)."""
    policy, trace = POLICIES.get("lrfu")(3), zipf_trace(300, experts=8)
    times = {expert: [] for expert in range(8)}
    for expert in range(8):
        policy.on_insert(expert)
    for clock, expert in enumerate(trace):
        policy.on_hit(expert)
        times[expert].append(clock + 8)
    crf = {e: sum(2 ** (-(307 - t) / 6) for t in [e, *at]) for e, at in times.items()}
    order = []
    for _ in range(8):
        order.append(policy.victim(()))
        policy.on_evict(order[-1])
    assert order == sorted(crf, key=crf.get)


def test_unknown_policy_names_the_choices():
    with pytest.raises(UnknownNameError, match=r"unknown eviction policy 'fifo': choose one of .*lru"):
        POLICIES.get("fifo")


class PaperARC:
    """Figure 4 of Megiddo and Modha (2003) line by line, on plain lists with the least recent first."""

    def __init__(self, capacity):
        self.c, self.p = capacity, 0.0
        self.t1, self.t2, self.b1, self.b2 = [], [], [], []

    def access(self, x):
        """Whether x missed."""
        if x in self.t1 or x in self.t2:  # case I
            (self.t1 if x in self.t1 else self.t2).remove(x)
            self.t2.append(x)
            return False
        if x in self.b1:  # case II
            self.p = min(self.c, self.p + max(len(self.b2) / len(self.b1), 1))
            self.replace(x)
            self.b1.remove(x)
            self.t2.append(x)
        elif x in self.b2:  # case III
            self.p = max(0, self.p - max(len(self.b1) / len(self.b2), 1))
            self.replace(x)
            self.b2.remove(x)
            self.t2.append(x)
        else:  # case IV
            l1 = len(self.t1) + len(self.b1)
            total = l1 + len(self.t2) + len(self.b2)
            if l1 == self.c:
                if len(self.t1) < self.c:
                    self.b1.pop(0)
                    self.replace(x)
                else:
                    self.t1.pop(0)
            elif total >= self.c:
                if total == 2 * self.c:
                    self.b2.pop(0)
                self.replace(x)
            self.t1.append(x)
        return True

    def replace(self, x):
        if self.t1 and (len(self.t1) > self.p or (x in self.b2 and len(self.t1) == self.p)):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))


@settings(max_examples=300, deadline=None)
@given(capacity=st.integers(1, 6), trace=st.lists(st.integers(0, 11), max_size=300))
def test_arc_is_the_papers_algorithm(capacity, trace):
    paper, policy, cached = PaperARC(capacity), POLICIES.get("arc")(capacity), set()
    for expert in trace:
        missed = paper.access(expert)
        assert missed == (expert not in cached)
        if missed:
            policy.on_miss(expert)
            if len(cached) == capacity:
                victim = policy.victim(())
                policy.on_evict(victim)
                cached.remove(victim)
            policy.on_insert(expert)
            cached.add(expert)
        else:
            policy.on_hit(expert)
        assert cached == {*paper.t1, *paper.t2}
        lists = [list(policy.t1), list(policy.t2), list(policy.b1), list(policy.b2)]
        assert lists == [paper.t1, paper.t2, paper.b1, paper.b2]
        assert policy.p == paper.p


@pytest.mark.parametrize("capacity", [4, 8, 16, 32])
def test_arcs_golden_counts_are_the_papers(capacity):
    paper = PaperARC(capacity)
    assert sum(paper.access(expert) for expert in zipf_trace()) == GOLDEN["arc"][capacity]


def test_arc_keeps_what_was_used_twice_through_a_scan():
    policy = POLICIES.get("arc")(4)
    for expert in (0, 1):
        policy.on_insert(expert)
        policy.on_hit(expert)
    assert misses(policy, [*range(10, 30), 0, 1], cached={0, 1}) == 20
    lru = POLICIES.get("lru")(4)
    for expert in (0, 1):
        lru.on_insert(expert)
    assert misses(lru, [*range(10, 30), 0, 1], cached={0, 1}) == 22


class AnyUse(RuleBasedStateMachine):
    """Accesses, pins, failed reads and requests at random: no policy names what is pinned or not cached."""

    name: str
    capacity = 3

    def __init__(self):
        super().__init__()
        self.policy = POLICIES.get(self.name)(self.capacity)
        self.cached = set()

    experts = st.integers(0, 9)

    @rule(expert=experts, pinned=st.sets(experts))
    def access(self, expert, pinned):
        if expert in self.cached:
            self.policy.on_hit(expert)
            return
        self.policy.on_miss(expert)
        if len(self.cached) == self.policy.capacity:
            victim = self.policy.victim(pinned)
            assert victim == self.policy.victim(pinned), "asking changes nothing"
            if victim is None:
                assert self.cached <= pinned
                return  # the expert passes through
            assert victim in self.cached - pinned
            self.policy.on_evict(victim)
            self.cached.remove(victim)
        self.policy.on_insert(expert)
        self.cached.add(expert)

    @rule(data=st.data())
    def lose(self, data):
        if self.cached:
            expert = data.draw(st.sampled_from(sorted(self.cached)))
            self.policy.on_evict(expert)
            self.cached.remove(expert)

    @rule()
    def begin_request(self):
        self.policy.begin_request()

    @rule(capacity=st.integers(0, 5))
    def resize(self, capacity):
        while len(self.cached) > capacity:
            victim = self.policy.victim(())
            self.policy.on_evict(victim)
            self.cached.remove(victim)
        self.policy.resize(capacity)

    @invariant()
    def everything_cached_can_be_evicted(self):
        assert (self.policy.victim(()) is not None) == bool(self.cached)
        for expert in self.cached:
            assert self.policy.victim(self.cached - {expert}) == expert

    @invariant()
    def ghosts_are_bounded(self):
        if self.name == "arc":
            sizes = [len(order) for order in (self.policy.t1, self.policy.t2, self.policy.b1, self.policy.b2)]
            capacity = self.policy.capacity
            assert sizes[0] + sizes[2] <= capacity
            assert sum(sizes) <= 2 * capacity
            assert self.policy.p <= capacity
            assert {*self.policy.t1, *self.policy.t2} == self.cached


@pytest.mark.parametrize("name", POLICIES.names())
def test_any_use(name):
    machine = type("Machine", (AnyUse,), {"name": name})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None))


@pytest.mark.parametrize("name", POLICIES.names())
def test_without_slots_there_is_no_victim(name):
    policy = POLICIES.get(name)(0)
    policy.on_miss(5)
    assert policy.victim(()) is None
    policy.begin_request()
    policy.on_miss(5)
    assert policy.victim(()) is None


def test_activation_aware_evicts_the_least_activated_then_the_least_recent():
    policy = POLICIES.get("activation-aware")(3)
    for expert in (1, 2, 3):
        policy.on_insert(expert)
    policy.on_hit(1)
    assert policy.victim(()) == 2, "2 and 3 were activated once, 2 longer ago"
    policy.on_hit(2)
    assert policy.victim(()) == 3
    policy.on_evict(3)
    policy.on_insert(3)
    assert policy.victim(()) == 1, "that 3 was out for a while does not forget its activation: two each, 1 longest ago"


def test_activation_aware_begins_a_request_with_what_earlier_ones_favoured():
    policy = POLICIES.get("activation-aware")(3)
    for expert in (1, 2, 3):
        policy.on_insert(expert)
    for expert in (1, 1, 1, 3):
        policy.on_hit(expert)
    policy.begin_request()
    assert policy.victim(()) == 2
    policy.on_hit(2)
    assert policy.victim(()) == 3, "one activation now outweighs any number before"
    policy.on_hit(3)
    assert policy.victim(()) == 1
