"""Conformance of every registered eviction policy, and golden miss counts on a fixed trace."""

import random

import pytest

from fate.cache import POLICIES
from fate.errors import UnknownNameError

# Misses of each policy on `zipf_trace`, by capacity (lru: as functools.lru_cache counts them). A changed number means a
# changed policy.
GOLDEN = {"lru": {4: 2984, 8: 2348, 16: 1581, 32: 792}}


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


def misses(policy, trace):
    """The shared get-loop."""
    cached, count = set(), 0
    for expert in trace:
        if expert in cached:
            policy.on_hit(expert)
            continue
        count += 1
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


def test_unknown_policy_names_the_choices():
    with pytest.raises(UnknownNameError, match=r"unknown eviction policy 'fifo': choose one of .*lru"):
        POLICIES.get("fifo")
