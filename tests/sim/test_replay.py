"""Replay through the runtime's cache: by hand, and by what must hold of any trace."""

import pytest
from hypothesis import given, settings

from fate.cache import ALLOCATIONS, POLICIES, SlotRequest
from fate.core import StepStats
from replay_oracle import CacheCounts, replay
from trace_support import one_layer, skewed, small_steps

LRU = POLICIES.get("lru")


def counts(steps, capacity, policy=LRU):
    return replay(one_layer(steps), [capacity], policy).total


def test_one_expert_at_a_time_is_plain_lru():
    assert counts([[0], [1], [0], [2], [1]], capacity=2) == CacheCounts(
        accesses=5, hits=1, first_accesses=3, evictions=2
    )


def test_a_step_does_not_evict_what_it_needs():
    """0 and 1 are cached; [2, 1] finds 1 and must evict 0, though 1 is no more recent."""
    assert counts([[1, 0], [2, 1], [1, 2]], capacity=2).hits == 1 + 2


def test_what_does_not_fit_passes_through():
    """0 and 1 get the slots and keep them; 2 is missed every time and evicts nobody."""
    assert counts([[0, 1, 2]] * 3, capacity=2) == CacheCounts(accesses=9, hits=4, first_accesses=3, evictions=0)


def test_of_the_hits_the_most_popular_is_the_most_recent():
    """Two experts of [0, 1, 2] must go when 3 and 4 come; 0, routed first, stays."""
    assert counts([[0, 1, 2], [0, 1, 2], [3, 4], [0]], capacity=3).hits == 3 + 1


def test_without_slots_everything_misses():
    assert counts([[0, 1], [0, 1]], capacity=0) == CacheCounts(accesses=4, hits=0, first_accesses=2, evictions=0)


@pytest.mark.parametrize("name", POLICIES.names())
@settings(max_examples=100, deadline=None)
@given(steps=small_steps)
def test_what_holds_of_any_trace(name, steps):
    policy = POLICIES.get(name)
    distinct = len({expert for step in steps for expert in step})
    for capacity in range(6):
        total = counts(steps, capacity, policy)
        assert total.accesses == sum(map(len, steps))
        assert total.first_accesses == distinct <= total.misses
        assert total.evictions == max(0, total.misses - capacity) or capacity < max(map(len, steps), default=0)
    assert counts(steps, 5, policy).misses == distinct, "all experts fit"


# Hits of each policy on `skewed`, in prefill and in decode, with half of the slots. A changed number means a changed
# replay or policy.
GOLDEN = {"activation-aware": (18, 496), "arc": (15, 460), "lrfu": (17, 490), "lru": (15, 458)}


@pytest.mark.parametrize("name", POLICIES.names())
def test_golden_hits(name):
    trace = skewed()
    shares = ALLOCATIONS.get("uniform")(SlotRequest(trace.meta.num_experts, slots=24, floor=2, top_k=4))
    result = replay(trace, shares, POLICIES.get(name))
    by_phase = (sum(layer.hits for layer in result.prefill), sum(layer.hits for layer in result.decode))
    assert by_phase == GOLDEN[name]
    assert result.total == sum(result.layers, CacheCounts())
    assert result.total.hits == sum(by_phase)


def test_a_request_begins_where_the_trace_says():
    begun = []

    class Told(LRU):
        def begin_request(self):
            begun.append(self)

    replay(skewed(layers=3), [8, 8, 8], Told)
    assert len(begun) == 3 * 2


def test_counters_are_named_as_in_the_runtime():
    assert set(CacheCounts.__dataclass_fields__) < set(StepStats.__dataclass_fields__)
    assert CacheCounts(accesses=4, hits=1).misses == 3
    assert CacheCounts(accesses=4, hits=1).hit_rate == 0.25
    assert CacheCounts().hit_rate == 0.0
