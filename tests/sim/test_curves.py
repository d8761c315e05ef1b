"""Miss curves: what replay counts, at every capacity."""

from hypothesis import given, settings

from fate.cache import POLICIES
from fate.sim.curves import lru_miss_curves
from replay_oracle import replay
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
