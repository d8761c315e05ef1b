"""Estimates of speed: arithmetic, and how they move with what they are made of."""

from dataclasses import replace

import pytest

from fate.plan.estimate import (
    HITS,
    IMPORTS_S,
    KERNEL_SHARE,
    OVERLAP_LOSS,
    SHARES,
    WASTED,
    Machine,
    Work,
    estimate,
    hit_rates,
)

WORK = Work("olmoe", 400_000_000, 5_000_000, 8_000_000, 700_000_000, top_k=4, layers=24, num_experts=60)
MACHINE = Machine(kernel_gb_per_s=30.0, prefill_gmacs=300.0, disk_gb_per_s=2.0)


def test_everything_in_memory_is_bound_by_memory() -> None:
    found = estimate(WORK, MACHINE, 1.0)
    read_s = (400e6 + 96 * 5e6) / 30e9 / KERNEL_SHARE + 24 * 0.0002
    assert found.hits == (1.0, 1.0, 1.0)
    assert found.tokens_per_s[0] == pytest.approx(1 / read_s)


def test_a_token_takes_the_longer_of_both_and_a_part_of_the_shorter() -> None:
    found = estimate(WORK, MACHINE, 0.5)
    missing = 96 * (1 - 0.813)
    compute = (400e6 + 96 * 5e6) / 30e9 / KERNEL_SHARE + 24 * 0.0002 + missing * 0.0002
    transfer = missing * 5e6 * (1 + WASTED) / 2e9
    assert transfer > compute
    assert found.tokens_per_s[0] == pytest.approx(1 / (transfer + OVERLAP_LOSS * compute))


@pytest.mark.parametrize("name", HITS)
def test_hit_rates_grow_with_the_share(name: str) -> None:
    rates = [hit_rates(name, share / 50)[0] for share in range(51)]
    assert rates == sorted(rates)
    assert rates[0] == 0.0
    assert rates[-1] == 1.0
    assert [hit_rates(name, share)[0] for share in SHARES] == pytest.approx(list(HITS[name]))


def test_a_family_without_a_trace_gets_the_spread_of_all() -> None:
    expected, low, high = hit_rates("jamba", 0.25)
    assert (low, high) == (min(row[3] for row in HITS.values()), max(row[3] for row in HITS.values()))
    assert low < expected < high


@pytest.mark.parametrize("faster", ["kernel_gb_per_s", "disk_gb_per_s"])
def test_a_faster_machine_is_faster(faster: str) -> None:
    before = estimate(WORK, MACHINE, 0.3)
    after = estimate(WORK, replace(MACHINE, **{faster: 2 * getattr(MACHINE, faster)}), 0.3)
    assert after.tokens_per_s[0] > before.tokens_per_s[0]
    assert after.tokens_per_s[1] < after.tokens_per_s[0] < after.tokens_per_s[2]


def test_a_prompts_experts_all_come_from_the_disk() -> None:
    first = estimate(WORK, MACHINE, 0.1, prompt=4096).first_token_s[0]
    assert first > IMPORTS_S + 24 * 60 * 5e6 / 2e9
