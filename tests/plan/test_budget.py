"""Budgets, and the refusals that name the number that would fit."""

import pytest

from fate.core import Envelope
from fate.errors import BudgetTooSmallError
from fate.plan.budget import RUNTIME_SLACK_BYTES, MemoryPlan, Needs, PlanRow, default_budget, describe, make_plan
from fate.units import GIB, MIB

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


def test_the_budget_buys_slots_and_never_more_than_it():
    plan = make_plan(GIB, ENVELOPE, NEEDS)
    assert plan.num_slots == (GIB - 600 * MIB) // MIB
    assert plan.total <= GIB
    assert sum(row.num_bytes for row in plan.rows()) == plan.total


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


def test_the_printed_plan_names_memories_only_where_there_are_several(monkeypatch):
    plan = make_plan(GIB, ENVELOPE, NEEDS)
    lines = describe(plan).splitlines()
    assert lines[0] == "runtime         400.00 MiB  interpreter, torch, transformers"
    assert lines[-1] == "total             1.00 GiB  of 1.00 GiB"
    rows = [*plan.rows(), PlanRow("slots", 3 * GIB, "of the card", space="cuda:0")]
    monkeypatch.setattr(MemoryPlan, "rows", lambda self: rows)
    assert [line.split()[0] for line in describe(plan).splitlines()] == ["host"] * 5 + ["cuda:0", "host"]
