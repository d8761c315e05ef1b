"""What a run's explanation says adds up, and its estimate of what prefetching saved follows from what it was told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import fate
from fate.core import ExpertKey, Routing, StepStats
from fate.engine.session import FateModel
from fate.tools.explanation import Explanation, LayerWaits, PhaseExplanation, explain_phase, link_bytes_per_s, observe
from fate.trace.observer import LayerEvent
from fate.trace.timeline import Event
from tiny import tiny_store

LINK = 1e6  # bytes per second
NOTHING = explain_phase(StepStats(), [], True, [], [])
Step = tuple[float, int, int]  # seconds waited, bytes demanded, prefetched bytes used


def read(start_s: float, end_s: float, num_bytes: int, kind: str = "demand") -> Event:
    return Event(start_s, end_s, kind, 0, 0, num_bytes)


def waits(*steps: Step) -> LayerWaits:
    """One layer's."""
    added = LayerWaits()
    for step in steps:
        added.add(*step)
    return added


def decoded(
    layers: Sequence[StepStats], steps: Sequence[LayerWaits] = (), *, prefetches: bool = True
) -> PhaseExplanation:
    """Ten tokens in a second."""
    whole = replace(sum(layers, StepStats()), tokens=10, total_s=1.0)
    steps = steps or [LayerWaits()] * len(layers)
    return explain_phase(whole, layers, prefetches, steps, [read(0.0, 1000 / LINK, 1000)])


def test_the_links_speed_counts_overlapping_reads_once() -> None:
    assert link_bytes_per_s([]) is None
    assert link_bytes_per_s([read(0, 2, 100), read(1, 3, 100)]) == pytest.approx(200 / 3)
    assert link_bytes_per_s([read(5, 6, 10), read(0, 7, 60)]) == pytest.approx(10), "one ended within the other"
    assert link_bytes_per_s([read(0, 1, 30), read(9, 10, 30)]) == pytest.approx(30), "idle time is not the link's"


def test_the_links_speed_is_that_of_demands_where_there_are_any() -> None:
    prefetch = read(0, 100, 1, "prefetch")
    assert link_bytes_per_s([prefetch, read(0, 1, 50)]) == pytest.approx(50)
    assert link_bytes_per_s([prefetch]) == pytest.approx(0.01)


def test_a_layer_that_waits_all_the_same_would_have_waited_for_what_was_guessed_too() -> None:
    phase = decoded([StepStats(), StepStats()], [waits((0.1, 100_000, 30_000), (0.1, 100_000, 0)), LayerWaits()])
    assert phase.saved_s == pytest.approx((0.03, 0.0))
    assert phase.hidden_s == pytest.approx(0.0)


def test_a_layer_that_does_not_wait_would_have_waited_for_what_computing_does_not_hide() -> None:
    waiting = waits((0.06, 100_000, 0), (0.08, 100_000, 0))
    calm = waits((0.0, 20_000, 50_000), (0.0, 0, 60_000), (0.0, 0, 0))
    phase = decoded([StepStats(), StepStats()], [waiting, calm])
    assert phase.hidden_s == pytest.approx(0.03)
    assert phase.saved_s == pytest.approx((0.0, 0.07 + 0.06 - 2 * 0.03)), "a step without prefetches says nothing"


def test_what_was_demanded_is_hidden_before_what_was_guessed() -> None:
    calm = waits((0.0, 90_000, 50_000))
    phase = decoded([StepStats(), StepStats()], [waits((0.06, 100_000, 0)), calm])
    assert phase.hidden_s == pytest.approx(0.04)
    assert phase.saved_s == (0.0, pytest.approx(0.05)), "no more than the link's time for the prefetches"


def test_what_computing_hides_anyway_saves_nothing() -> None:
    phase = decoded([StepStats(), StepStats()], [waits((0.01, 100_000, 0)), waits((0.0, 0, 50_000))])
    assert phase.saved_s == (0.0, 0.0)


def test_a_wait_beyond_the_links_time_is_not_counted_as_hidden() -> None:
    phase = decoded([StepStats()], [waits((0.5, 100_000, 30_000))])
    assert (phase.hidden_s, phase.saved_s) == (0.0, pytest.approx((0.03,)))


def test_where_no_layer_waited_the_estimate_is_the_most_it_can_be() -> None:
    all_guessed = StepStats(accesses=5, hits=5, prefetch_bytes=300_000, prefetch_used_bytes=300_000, predict_s=0.01)
    phase = decoded([all_guessed], [waits((0.0, 0, 300_000))])
    assert phase.hidden_s is None
    assert phase.saved_s == pytest.approx((0.3,))
    assert "saved at most 30.0 ms a token" in Explanation(NOTHING, phase, ()).words


def test_without_any_read_what_was_saved_is_not_known() -> None:
    used = StepStats(1, accesses=1, hits=1, prefetch_used_bytes=1000)
    assert explain_phase(used, [used], True, [waits((0.0, 0, 1000))], []).saved_s is None
    assert explain_phase(used, [used], True, [waits((0.0, 0, 0))], []).saved_s == (0.0,)


def test_the_gain_is_less_what_it_took_to_prefetch() -> None:
    layers = [StepStats(predict_s=0.02), StepStats(prefetch_bytes=50_000, prefetch_used_bytes=50_000), StepStats()]
    phase = decoded(layers, [LayerWaits(), waits((0.1, 100_000, 50_000)), LayerWaits()])
    assert phase.gain_s(0) == pytest.approx(-0.02)
    assert phase.gain_s(1) == pytest.approx(0.05)
    assert phase.gain_s(2) is None, "nothing was prefetched there"
    assert phase.gain_s() == pytest.approx(0.03)
    assert decoded(layers, prefetches=False).gain_s(0) is None


@pytest.mark.parametrize(
    "layer, prefetches, said",
    [
        (
            StepStats(10, accesses=20, hits=15, demand_bytes=600_000, stall_s=0.6, prefetch_bytes=400_000,
                      prefetch_used_bytes=300_000, predict_s=0.019),
            True,
            "prefetching saved about 30.0 ms a token, which took 100 ms, and cost 1.90 ms; 10% of the bytes read were "
            "not needed",
        ),
        (
            StepStats(10, accesses=20, hits=10, demand_bytes=600_000, stall_s=0.6, predict_s=0.01),
            True,
            "nothing was prefetched: predicting cost 1.00 ms, and layers waited 60.0 ms of 100 ms a token",
        ),
        (
            StepStats(10, accesses=20, hits=10, demand_bytes=600_000, stall_s=0.6),
            False,
            "this system does not prefetch: layers waited 60.0 ms of 100 ms a token for experts",
        ),
        (
            StepStats(10, accesses=20, hits=20, predict_s=0.01),
            True,
            "every expert needed was in memory; computing took 100 ms a token",
        ),
    ],
)  # fmt: skip
def test_in_words(layer: StepStats, prefetches: bool, said: str) -> None:
    phase = decoded([layer], [waits((0.6, 600_000, layer.prefetch_used_bytes))], prefetches=prefetches)
    assert Explanation(NOTHING, phase, ()).words == said


def test_bytes_that_the_phase_before_had_read_are_not_less_than_no_waste() -> None:
    carried = StepStats(accesses=2, demand_bytes=100_000, stall_s=0.1, prefetch_used_bytes=50_000)
    phase = decoded([carried])
    assert phase.to_json()["layers"][0]["wasted_bytes"] == 0
    assert "; 0% of the bytes read were not needed" in Explanation(NOTHING, phase, ()).words


def explained(model: FateModel, new_tokens: int = 12) -> Explanation:
    with observe(model.fate) as observation:
        model.generate(torch.arange(20)[None], max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    return observation.explain()


@pytest.mark.parametrize("system", ["cross-layer", "load-on-demand", "load-on-demand-uncached"])
def test_a_run_is_accounted_for(system: str) -> None:
    with fate.load(tiny_store("qwen2_moe"), experts="50%", system=system) as model:
        explained(model)
        explanation, stats = explained(model), model.fate.stats()
        decode = explanation.decode
        assert (explanation.prefill.stats.tokens, decode.stats.tokens) == (20, 11), "of the second run alone"
        assert len(decode.layers) == 3
        assert decode.all_layers.accesses == 11 * 3 * 3
        assert decode.all_layers.bytes_moved < stats.decode.bytes_moved
        assert decode.all_layers.total_s + decode.outside_s == pytest.approx(decode.stats.total_s)
        assert 0 < decode.outside_s < decode.stats.total_s
        if system == "cross-layer":
            link_s = decode.all_layers.prefetch_used_bytes / decode.link_bytes_per_s
            assert 0 < decode.all_saved_s <= link_s * (1 + 1e-9)
            assert decode.gain_s() == pytest.approx(decode.all_saved_s - decode.cost_s())
            assert decode.cost_s() >= decode.all_layers.predict_s > 0
        else:
            assert decode.all_saved_s is decode.gain_s() is None
        json.dumps(explanation.to_json(), allow_nan=False)


def test_a_run_of_one_token_is_explained_by_its_prompt() -> None:
    with fate.load(tiny_store("qwen2_moe"), experts="50%", system="load-on-demand") as model:
        explanation = explained(model, new_tokens=1)
        assert explanation.decode.stats.tokens == 0
        assert explanation.words.startswith("this system does not prefetch: layers waited ")
        assert "a token" not in explanation.words
        json.dumps(explanation.to_json(), allow_nan=False)


def test_with_everything_in_memory_nothing_is_saved() -> None:
    with fate.load(tiny_store("qwen2_moe"), system="cross-layer") as model:
        model(torch.arange(259)[None])
        explanation = explained(model)
        assert explanation.decode.stats.misses == 0
        assert explanation.words.startswith("every expert needed was in memory; computing took ")
        assert explanation.decode.all_saved_s in (0.0, None)


def test_the_engines_notes_are_those_of_the_run() -> None:
    with fate.load(tiny_store("qwen2_moe"), experts="50%") as model:
        model.fate.engine.notes.append("before")
        with observe(model.fate) as observation:
            model.fate.engine.notes.append("meanwhile")
        assert observation.explain().to_json()["notes"] == ["meanwhile"]


def test_a_wait_while_a_guess_for_another_layer_is_read_is_a_cost() -> None:
    with fate.load(tiny_store("qwen2_moe"), experts="50%", system="cross-layer") as model:
        with observe(model.fate) as observation:
            watch, routing = observation.watch, Routing(1, {4: 1})
            watch.on_read(ExpertKey(2, 5), "prefetch", 0.0, 3.0, 10)
            watch.on_read(ExpertKey(1, 4), "prefetch", 3.0, 4.0, 10)  # what it waits for
            watch.on_read(ExpertKey(1, 4), "demand", 4.0, 9.0, 10)
            watch.on_layer(LayerEvent(routing, 0.0, 9.0, (), ((1.0, 9.0),), None, StepStats()))
        decode = observation.explain().decode
        assert decode.delayed_s == (0.0, 2.0, 0.0)
        assert decode.cost_s(1) == decode.delayed_s[1]
        assert decode.cost_s() == pytest.approx(sum(decode.delayed_s))
