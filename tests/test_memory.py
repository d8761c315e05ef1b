"""Sizes, budgets and the refusals that name the number that would fit."""

import os
from pathlib import Path

import pytest

from fate import memory
from fate.core import Envelope
from fate.errors import BudgetTooSmallError, ExpertShareError, MemorySizeError
from fate.memory import (
    GIB,
    MIB,
    RUNTIME_SLACK_BYTES,
    Needs,
    available_bytes,
    default_budget,
    format_bytes,
    make_plan,
    parse_experts,
    parse_memory,
)

NEEDS = Needs(
    runtime=400 * MIB,
    dense=100 * MIB,
    kv_cache=50 * MIB,
    buffers=50 * MIB,
    slot=MIB,
    min_slots=24,
    max_slots=968,
    total_experts=960,
)
ENVELOPE = Envelope(max_context=2048)


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GiB", 6 * GIB), ("6gib", 6 * GIB), ("1.5 GB", 1_500_000_000), ("900MB", 900_000_000), ("4G", 4 * GIB), (7, 7)],
)
def test_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["0", "-1", "lots", "4XB", "", "GiB", "1e3", "inf", "nan", 0, -5, True, "6 Gi B"])
def test_sizes_that_are_none(text):
    with pytest.raises(MemorySizeError, match="write a positive size such as 6GiB"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("value", "slots"), [("25%", 240), (0.25, 240), ("0.25", 240), (240, 240), ("100%", 960), (5000, 960)]
)
def test_expert_shares(value, slots):
    assert parse_experts(value, 960) == slots


@pytest.mark.parametrize("value", ["0%", "-3", "many", "%", 0, -0.5])
def test_expert_shares_that_are_none(value):
    with pytest.raises(ExpertShareError):
        parse_experts(value, 960)


def test_the_budget_buys_slots_and_never_more_than_it():
    plan = make_plan(GIB, ENVELOPE, NEEDS)
    assert plan.num_slots == (GIB - 600 * MIB) // MIB
    assert plan.total <= GIB
    assert sum(size for _, size, _ in plan.rows()) == plan.total


def test_a_large_budget_holds_every_expert_and_no_more():
    assert make_plan(64 * GIB, ENVELOPE, NEEDS).num_slots == NEEDS.max_slots


def test_too_small_names_the_smallest_that_works():
    with pytest.raises(BudgetTooSmallError, match="the smallest that works is 656MiB") as refusal:
        make_plan(623 * MIB, ENVELOPE, NEEDS)
    assert refusal.value.smallest_bytes == 624 * MIB + RUNTIME_SLACK_BYTES
    assert make_plan(624 * MIB, ENVELOPE, NEEDS).num_slots == NEEDS.min_slots
    with pytest.raises(BudgetTooSmallError):
        make_plan(624 * MIB - 1, ENVELOPE, NEEDS)


def test_max_experts_caps_but_never_below_the_floor():
    assert make_plan(64 * GIB, ENVELOPE, NEEDS, max_experts=240).num_slots == 240
    assert make_plan(64 * GIB, ENVELOPE, NEEDS, max_experts=1).num_slots == NEEDS.min_slots


def test_default_budget_is_what_this_machine_has():
    assert 0 < default_budget() < 1 << 50
    assert format_bytes(3 * MIB // 2) == "1.50 MiB"


def test_pages_of_files_are_not_available_twice(monkeypatch):
    """MemAvailable counts them already, whoever has them mapped."""
    page, real = os.sysconf("SC_PAGE_SIZE"), Path.read_text
    texts = {"/proc/meminfo": "MemFree: 1 kB\nMemAvailable: 1000 kB\n", "/proc/self/statm": "900 70 30 1 0 5 0\n"}
    monkeypatch.setattr(Path, "read_text", lambda self, **options: texts.get(str(self)) or real(self, **options))
    monkeypatch.setattr(memory, "cgroup_limit_bytes", lambda: None)
    assert available_bytes() == 1000 * 1024 + 40 * page
    monkeypatch.setattr(memory, "cgroup_limit_bytes", lambda: 4096)
    assert available_bytes() == 4096
