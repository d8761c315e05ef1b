"""Arithmetic of rows: paired ratios, bounds, what is summed and what is a median."""

from __future__ import annotations

import pytest

from bench_support import COMPUTE, run
from fate.bench.passes import Pass
from fate.bench.summary import Phase, Run, make_run, paired_ratio, repeated_run, system_row
from fate.core import StepStats
from fate.engine.session import RunStats


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
    assert row["decode"]["recall"] is row["decode"]["coverage"] is None, "no one was asked"


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
    over = row["decode"]["speedup_over"]
    assert {name: (ratio["median"], ratio["range"]) for name, ratio in over.items()} == {
        "eap": (3.0, [2.0, 4.0]),
        "load-on-demand": (3.0, [3.0, 3.0]),
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


def test_the_ceiling_of_overlap() -> None:
    """At rho 1 (20 MB at 1 GB/s: 0.02 s, compute 0.4 s in all), with 20 misses: twice; with 10: 0.6 / 0.4."""
    for misses, uncached, ceiling in ((20, 20, 2.0), (10, 10, 1.5), (40, 40, 1.5), (10, 20, 1.5), (10, 40, 0.75)):
        stats = StepStats(tokens=4, accesses=50, hits=50 - misses, uncached=uncached)
        theirs = Run(Phase(1.0, 10, stats), Phase(2.0, 4, stats), 1.0, (), 12)
        runs = {name: [theirs] for name in ("load-on-demand-uncached", "load-on-demand", "eap", "fate")}
        over = system_row(runs, "fate", COMPUTE, 1e9, {})["decode"]["speedup_over"]
        assert over["eap"]["at_most"] == over["load-on-demand"]["at_most"] == pytest.approx(ceiling)
        assert "at_most" not in over["load-on-demand-uncached"], "ours caches, so overlap is not all it gains"


def test_hits_against_those_of_a_perfect_predictor() -> None:
    runs = {"fate": [run(1.0, hits=6)], "fate-oracle": [run(0.5, hits=8)], "eap": [run(1.0, hits=9)]}
    row = system_row(runs, "fate", COMPUTE, 1e9, {})["decode"]
    assert row["hits_of_perfect"] == pytest.approx(0.75)
    assert row["speedup_over"]["fate-oracle"]["median"] == 0.5
    for other in ("eap", "fate-oracle"):
        assert "hits_of_perfect" not in system_row(runs, other, COMPUTE, 1e9, {})["decode"]


def test_what_was_predicted_fits_the_link_or_not() -> None:
    """10 experts of 0.02 s and 0.1 s of wrong reads in 0.4 s of compute."""
    stats = StepStats(tokens=4, asked=50, uncached=12, covered=10, prefetch_bytes=10**8 + 50, prefetch_used_bytes=50)
    theirs = Run(Phase(1.0, 10, stats), Phase(2.0, 4, stats), 1.0, (), 12)
    row = system_row({"fate": [theirs]}, "fate", COMPUTE, 1e9, {})["decode"]
    assert row["predicted_link_share"] == pytest.approx((10 * 0.02 + 0.1) / 0.4)
    assert system_row({"fate": [run(1.0)]}, "fate", COMPUTE, 1e9, {})["decode"]["predicted_link_share"] is None


def test_a_phase_is_link_bound_where_its_bytes_take_longer_than_its_compute() -> None:
    for read, bound in ((399_000_000, False), (401_000_000, True)):
        row = system_row({"load-on-demand": [run(2.0, read=read)]}, "load-on-demand", COMPUTE, 1e9, {})
        assert row["decode"]["link_bound"] is bound
        assert row["prefill"]["link_bound"] is True, "0.01 s of compute"


def test_a_run_is_what_its_json_says() -> None:
    runs = {"fate": [run(1.0, 3.0, read=400, hits=6, notes=["off"]), run(2.0, 5.0, read=100)]}
    row = system_row(runs, "fate", COMPUTE, 1e9, {"decode": 20.0, "prefill": 5.0})
    again = [repeated_run(repeat, 1, row["slots"], row["notes"]) for repeat in row["repeats"]]
    assert system_row({"fate": again}, "fate", COMPUTE, 1e9, {"decode": 20.0, "prefill": 5.0}) == row
