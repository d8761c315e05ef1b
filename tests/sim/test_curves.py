"""Miss curves: what replay counts, at every capacity."""

import pytest
from hypothesis import given, settings

from fate.cache import ALLOCATIONS, POLICIES, SlotRequest
from fate.sim.curves import cost_curves, lru_miss_curves
from fate.sim.replay import replay
from trace_support import one_layer, skewed, small_steps

LRU = POLICIES.get("lru")


@settings(max_examples=200, deadline=None)
@given(steps=small_steps)
def test_equal_to_replay_at_every_capacity(steps):
    trace = one_layer(steps, experts=5)
    (curve,) = lru_miss_curves(trace)
    assert curve == [replay(trace, [capacity], LRU).total.misses for capacity in range(6)]


def test_every_layer_and_phase_on_its_own():
    trace = skewed()
    every, decode = lru_miss_curves(trace), lru_miss_curves(trace, prefill=False)
    for capacity in range(17):
        result = replay(trace, [capacity] * 3, LRU)
        assert [curve[capacity] for curve in every] == [layer.misses for layer in result.layers]
        assert [curve[capacity] for curve in decode] == [layer.misses for layer in result.decode]


def test_costs_are_seconds_of_a_decode_step():
    trace = one_layer([[0, 1], [0, 1], [2, 3], [0, 1]], experts=4)
    (costs,) = cost_curves(trace, [0.01])
    assert costs[0] == pytest.approx(0.01 * 8 / 4)
    assert costs[4] == pytest.approx(0.01 * 4 / 4)


def test_the_measured_allocation_takes_them():
    trace = skewed()
    costs = cost_curves(trace, [0.001, 0.001, 0.02])
    request = SlotRequest(trace.meta.num_experts, slots=20, floor=2, top_k=4, costs=costs)
    first, second, dear = ALLOCATIONS.get("measured")(request)
    assert dear > max(first, second)
