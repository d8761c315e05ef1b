"""Arithmetic of rows: paired ratios, bounds, what is summed and what is a median."""

from __future__ import annotations

import pytest

from bench_support import COMPUTE, run
from fate.bench.passes import Pass
from fate.bench.summary import Phase, Run, make_run, paired_ratio, system_row
from fate.core import StepStats
from fate.runtime.session import RunStats


def test_ratios_are_of_the_same_repeat() -> None:
    ours, theirs = [10.0, 20.0, 90.0], [5.0, 40.0, 30.0]
    assert paired_ratio(ours, theirs) == {"median": 2.0, "range": [0.5, 3.0]}, "not 20 / 30"
    with pytest.raises(ValueError, match="zip"):
        paired_ratio(ours, theirs[:2])


def test_a_run_sums_its_requests() -> None:
    def one(ttft_s: float, decode_s: float, hits: int) -> Pass:
        return Pass(8, 2, ttft_s, decode_s, RunStats(StepStats(hits=1, accesses=4), StepStats(hits=hits, accesses=10)))

    whole = make_run([one(1.0, 4.0, 3), one(3.0, 6.0, 5)], [], 7, ["off"])
    assert (whole.prefill.seconds, whole.prefill.tokens, whole.ttft_s) == (4.0, 16, 2.0)
    assert (whole.decode.seconds, whole.decode.tokens, whole.decode.tokens_per_s) == (10.0, 4, 0.4)
    assert (whole.decode.stats.hits, whole.prefill.stats.hits) == (8, 2)
    assert (whole.slots, whole.notes) == (7, ("off",))


def test_speeds_are_medians_with_their_range() -> None:
    row = system_row({"fate": [run(4.0), run(1.0), run(2.0)]}, "fate", COMPUTE, 1e9, {})
    assert row["decode"]["tokens_per_s"] == 2.0
    assert row["decode"]["tokens_per_s_range"] == [1.0, 4.0]
    assert row["prefill"]["tokens_per_s"] == 10.0
    assert row["ttft_s"] == 1.0
    assert [repeat["decode"]["seconds"] for repeat in row["repeats"]] == [4.0, 1.0, 2.0], "every repeat, in order"


def test_the_bound_is_compute_or_bytes_whichever_is_more() -> None:
    compute = 4 * COMPUTE.decode_s_per_token
    few = system_row({"fate": [run(2 * compute, read=1000)]}, "fate", COMPUTE, 1e9, {})["decode"]
    assert few["bound_s_per_token"] == pytest.approx(COMPUTE.decode_s_per_token)
    assert few["time_over_bound"] == pytest.approx(2.0)
    many = system_row({"fate": [run(3.0, read=2 * 10**9)]}, "fate", COMPUTE, 1e9, {})["decode"]
    assert many["bound_s_per_token"] == pytest.approx(2.0 / 4)
    assert many["time_over_bound"] == pytest.approx(1.5)
    assert many["bytes_per_token"] == 5 * 10**8


def test_counters_are_summed_over_repeats() -> None:
    row = system_row({"fate": [run(1.0, hits=2), run(1.0, hits=9)]}, "fate", COMPUTE, 1e9, {})
    assert row["decode"]["hit_rate"] == pytest.approx(11 / 20)
    assert row["layer_hit_rate"] == {"decode": [11 / 20] * 2, "prefill": [11 / 20] * 2}
    assert row["decode"]["recall"] is None, "no one was asked"


def test_no_phase_wastes_less_than_nothing() -> None:
    used_later = StepStats(tokens=4, prefetch_bytes=100, prefetch_used_bytes=300)
    whole = Run(Phase(1.0, 4, used_later), Phase(1.0, 4, used_later), 1.0, (), 12)
    assert system_row({"fate": [whole]}, "fate", COMPUTE, 1e9, {})["decode"]["wasted_bytes_per_token"] == 0


def test_every_baseline_that_ran_is_compared_with() -> None:
    runs = {
        "eap": [run(4.0, 2.0), run(8.0, 2.0)],
        "load-on-demand": [run(6.0, 1.0), run(6.0, 1.0)],
        "fate": [run(2.0, 0.5), run(2.0, 0.5)],
    }
    row = system_row(runs, "fate", COMPUTE, 1e9, {})
    assert row["decode"]["speedup_over"] == {
        "eap": {"median": 3.0, "range": [2.0, 4.0]},
        "load-on-demand": {"median": 3.0, "range": [3.0, 3.0]},
    }
    assert row["prefill"]["speedup_over"]["eap"]["median"] == 4.0
    assert list(system_row(runs, "eap", COMPUTE, 1e9, {})["decode"]["speedup_over"]) == ["load-on-demand"]


def test_distance_to_belady() -> None:
    runs = {"fate": [run(1.0, read=400)]}
    row = system_row(runs, "fate", COMPUTE, 1e9, {"decode": 50.0, "prefill": 0.0})
    assert row["decode"]["bytes_over_belady"] == 2.0
    assert row["prefill"]["bytes_over_belady"] is None, "nothing had to be read"
    assert "bytes_over_belady" not in system_row(runs, "fate", COMPUTE, 1e9, {})["decode"]


def test_notes_are_given_once() -> None:
    runs = {"fate": [run(1.0, notes=["prefetching is off"]), run(1.0, notes=["prefetching is off", "b"])]}
    assert system_row(runs, "fate", COMPUTE, 1e9, {})["notes"] == ["b", "prefetching is off"]
