"""The bound: equal to the best of all choices on small traces, and below every policy on larger ones."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fate.cache import POLICIES
from fate.sim.belady import belady_misses, fewest_misses
from replay_oracle import replay
from trace_support import skewed, small_steps


def brute_force(steps, capacity, bypass):
    """Fewest misses over every choice of what each step leaves in the cache."""
    best = {frozenset(): 0}
    for step in map(frozenset, steps):
        after = {}
        for cached, misses in best.items():
            for left in allowed(cached, step, capacity, bypass):
                total = misses + len(step - cached)
                after[left] = min(after.get(left, total), total)
        best = after
    return min(best.values())


def allowed(cached, step, capacity, bypass):
    pool = sorted(cached | step)
    for size in range(min(capacity, len(pool)) + 1):
        for left in map(frozenset, itertools.combinations(pool, size)):
            if bypass or step <= left or (len(left) == capacity and left <= step):
                yield left


@settings(max_examples=100, deadline=None)
@given(steps=small_steps.map(lambda steps: steps[:8]), capacity=st.integers(0, 5), bypass=st.booleans())
def test_no_choice_does_better(steps, capacity, bypass):
    assert fewest_misses(steps, capacity, bypass=bypass) == brute_force(steps, capacity, bypass)


def test_the_textbook_example():
    """Reference string of Belady's anomaly: 7 faults with three frames."""
    reference = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]
    assert fewest_misses([[page] for page in reference], 3) == 7


def test_bypassing_spares_what_is_needed_next():
    steps = [[0], [1], [0], [2], [0]]
    assert fewest_misses(steps, 1) == 5
    assert fewest_misses(steps, 1, bypass=True) == 3


@pytest.mark.parametrize("name", POLICIES.names())
@pytest.mark.parametrize("capacity", [2, 4, 8, 12])
def test_bounds_every_policy(name, capacity):
    trace = skewed()
    bound = belady_misses(trace, [capacity] * 3)
    assert all(
        low <= layer.misses for low, layer in zip(bound, replay(trace, [capacity] * 3, POLICIES.get(name)).layers)
    )
    assert all(low <= forced for low, forced in zip(belady_misses(trace, [capacity] * 3, bypass=True), bound))


def test_with_all_slots_only_first_accesses_miss():
    trace = skewed()
    first = [len({expert for step in trace.steps for expert in step.layers[layer]}) for layer in range(3)]
    assert belady_misses(trace, [16] * 3) == first
