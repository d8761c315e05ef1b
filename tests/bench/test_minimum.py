"""Belady's bytes for the measured requests alone, though the cache was warm from others."""

from __future__ import annotations

import fate
from fate.bench.minimum import Minimum, equal_capacities, split_requests
from fate.store.reader import StoreReader
from fate.trace import RoutingTrace, TraceMeta, TraceStep
from tiny import tiny_store


def step(request: int, *experts: int, prompt: bool = False) -> TraceStep:
    """A prompt has two tokens, any other step one; one layer."""
    return TraceStep(request, prompt, 2 if prompt else 1, (dict.fromkeys(experts, 1),))


STEPS = (
    *(step(0, 0, 1, prompt=True), step(0, 1), step(0, 2)),
    *(step(1, 2, 3, prompt=True), step(1, 2), step(1, 0), step(1, 3)),
)
TRACE = RoutingTrace(TraceMeta("one", (4,), 2), STEPS)


def test_requests_are_told_apart_by_their_prompts() -> None:
    assert split_requests(TRACE) == [list(STEPS[:3]), list(STEPS[3:])]


def test_only_what_was_measured_counts() -> None:
    warm, measured = split_requests(TRACE)
    minimum = Minimum(TRACE, [warm], [measured], [100])
    # Two slots: after the warm-up 2 is cached, so the prompt lacks 3; decoding then lacks 0, and 2 can make room.
    assert minimum.bytes_per_token([2]) == {"prefill": 100 / 2, "decode": 100 / 3}
    # Three slots: 0 stays too.
    assert minimum.bytes_per_token([3]) == {"prefill": 100 / 2, "decode": 0.0}
    cold = Minimum(TRACE, [], [measured], [100])
    assert cold.bytes_per_token([2]) == {"prefill": 200 / 2, "decode": 100 / 3}


def test_without_a_cache_every_access_is_read() -> None:
    warm, measured = split_requests(TRACE)
    assert Minimum(TRACE, [warm], [measured], [100]).bytes_per_token([0]) == {"prefill": 100.0, "decode": 100.0}


def test_all_systems_are_given_the_same_capacities() -> None:
    store = tiny_store("qwen2_moe")
    reader = StoreReader(store)
    reader.close()
    found = []
    for system in ("load-on-demand", "cross-layer", "load-on-demand-uncached"):
        with fate.load(store, system=system, experts=18, max_context=32, on_plan=lambda *_: None) as model:
            found.append(equal_capacities(model, reader.header))
    assert found == [[4, 4, 4]] * 3, "18 slots less 6 for two tokens' worth of top 3"
