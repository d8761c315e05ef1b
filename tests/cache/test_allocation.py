"""Conformance of every registered allocation, and what each is for."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fate.cache import ALLOCATIONS, NEEDS_COSTS, SlotRequest
from fate.errors import MissingCostsError

costs_that_fall = st.builds(
    lambda drops: [sum(drops[at:]) for at in range(len(drops) + 1)], st.lists(st.integers(0, 9), min_size=1, max_size=9)
)
convex_costs = st.builds(
    lambda drops: [sum(sorted(drops, reverse=True)[at:]) for at in range(len(drops) + 1)],
    st.lists(st.integers(0, 9), min_size=1, max_size=9),
)


def request(costs, slots, floor, top_k=1):
    return SlotRequest([len(curve) - 1 for curve in costs], slots, floor, top_k, costs)


def total_cost(costs, shares):
    return sum(curve[share] for curve, share in zip(costs, shares, strict=True))


@pytest.mark.parametrize("name", ALLOCATIONS.names())
@settings(max_examples=200, deadline=None)
@given(
    costs=st.lists(costs_that_fall, min_size=1, max_size=20),
    slots=st.integers(0, 200),
    floor=st.integers(0, 3),
    top_k=st.integers(1, 6),
)
def test_every_slot_is_shared_within_floor_and_experts(name, costs, slots, floor, top_k):
    asked = request(costs, slots, floor, top_k)
    floors = [min(floor, experts) for experts in asked.num_experts]
    shares = ALLOCATIONS.get(name)(asked)
    assert all(low <= share <= n for low, share, n in zip(floors, shares, asked.num_experts, strict=True))
    assert sum(shares) == max(sum(floors), min(slots, sum(asked.num_experts)))


def test_what_needs_costs_says_so():
    asked = SlotRequest((8, 8), slots=8, floor=1)
    for name in ALLOCATIONS.names():
        if name in NEEDS_COSTS:
            with pytest.raises(MissingCostsError, match=rf"allocation '{name}' needs .* record a routing trace first"):
                ALLOCATIONS.get(name)(asked)
        else:
            assert sum(ALLOCATIONS.get(name)(asked)) == 8
    assert set(ALLOCATIONS.names()) >= NEEDS_COSTS


@pytest.mark.parametrize(
    "slots, shares",
    [
        (3 * 2, [2, 2, 2]),
        (3 * 2 + 1, [3, 2, 2]),
        (3 * 2 + 7, [8, 3, 2]),
        (24, [8, 8, 8]),
        (5, [3, 1, 1]),  # too few for the floor of two each: the layers' least, and the rest to the first
    ],
)
def test_shallow_layers_first(slots, shares):
    assert ALLOCATIONS.get("shallow")(SlotRequest((8, 8, 8), slots, floor=1, top_k=2)) == shares


@settings(max_examples=200, deadline=None)
@given(costs=st.lists(convex_costs, min_size=1, max_size=12), slots=st.integers(0, 100), floor=st.integers(0, 3))
def test_measured_is_no_worse_than_uniform(costs, slots, floor):
    asked = request(costs, slots, floor)
    measured, uniform = (ALLOCATIONS.get(name)(asked) for name in ("measured", "uniform"))
    assert total_cost(costs, measured) <= total_cost(costs, uniform)


@settings(max_examples=150, deadline=None)
@given(costs=st.lists(convex_costs, min_size=1, max_size=3), slots=st.integers(0, 20), floor=st.integers(0, 2))
def test_measured_is_the_best_there_is_where_costs_are_convex(costs, slots, floor):
    asked = request(costs, slots, floor)
    measured = ALLOCATIONS.get("measured")(asked)
    choices = itertools.product(*(range(min(floor, n), n + 1) for n in asked.num_experts))
    best = min(total_cost(costs, shares) for shares in choices if sum(shares) == sum(measured))
    assert total_cost(costs, measured) == best


def test_measured_sees_what_lies_behind_a_slot_that_saves_nothing():
    cliff = [9, 9, 9, 0, 0]  # worth nothing until three are cached
    slope = [6, 4, 3, 2, 1]
    assert ALLOCATIONS.get("measured")(request([slope, cliff], slots=3, floor=0)) == [0, 3]
    assert ALLOCATIONS.get("measured")(request([slope, cliff], slots=5, floor=0)) == [2, 3]
