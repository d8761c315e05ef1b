"""The memory plan: what a run needs, row by row, and how many expert slots the rest of a budget buys.

Owns the arithmetic; measures nothing about models (callers pass the rows) and allocates nothing.

>>> plan = make_plan(parse_memory("6GiB"), Envelope(2048), needs)
>>> [row.name for row in plan.rows()]
['runtime', 'dense weights', 'KV cache', 'buffers', 'expert slots']
"""

from __future__ import annotations

from dataclasses import dataclass

from fate.core import Envelope
from fate.errors import BudgetTooLargeError, BudgetTooSmallError
from fate.plan.machine import available_bytes
from fate.units import GIB, MIB, format_bytes, format_memory_argument

DEFAULT_PREFILL_CHUNK = 512  # tokens a forward
RUNTIME_SLACK_BYTES = 32 * MIB  # the measured runtime row differs by some MiB from process to process


def default_budget() -> int:
    """What is free less a margin (an eighth, at most 1 GiB, at least 256 MiB) for the rest of the machine."""
    available = available_bytes()
    return max(available - min(max(available // 8, 256 * MIB), GIB), 1)


@dataclass(frozen=True)
class Needs:
    """What a model needs besides expert slots, in bytes, and the bounds on its slots.

    runtime: interpreter, libraries and their thread-local scratch. dense: weights that stay resident. kv_cache: for
    the whole envelope. buffers: activations, expert rows, logits. slot: one expert. min_slots keeps every layer's
    floor and the transient region; max_slots holds every expert. records: of the slower tier, where that is memory too.
    """

    runtime: int
    dense: int
    kv_cache: int
    buffers: int
    slot: int
    min_slots: int
    max_slots: int
    total_experts: int
    records: int = 0

    @property
    def fixed(self) -> int:
        return self.runtime + self.dense + self.kv_cache + self.buffers + self.records

    @property
    def smallest(self) -> int:
        """The budget to name in a refusal: it fits in another process too."""
        return self.fixed + self.min_slots * self.slot + RUNTIME_SLACK_BYTES


@dataclass(frozen=True)
class PlanRow:
    """One line of a plan: so many bytes of one memory (`space`) for one purpose."""

    name: str
    num_bytes: int
    note: str
    space: str = "host"


@dataclass(frozen=True)
class MemoryPlan:
    """A budget divided: `num_slots` slots of `needs.slot` bytes beside the fixed rows."""

    budget: int
    envelope: Envelope
    needs: Needs
    num_slots: int

    @property
    def total(self) -> int:
        return self.needs.fixed + self.num_slots * self.needs.slot

    def rows(self) -> list[PlanRow]:
        """The printed table's rows, without the total."""
        n, e = self.needs, self.envelope
        share = min(self.num_slots, n.total_experts) / n.total_experts
        slower_tier = [PlanRow("records", n.records, "the slower tier, emulated in memory")] if n.records else []
        return [
            *slower_tier,
            PlanRow("runtime", n.runtime, "interpreter, torch, transformers"),
            PlanRow("dense weights", n.dense, "attention, shared experts, embeddings"),
            PlanRow("KV cache", n.kv_cache, f"{e.max_batch} x {e.max_context} tokens"),
            PlanRow(
                "buffers", n.buffers, f"{e.max_tokens_per_forward} tokens a forward, {e.logit_rows} rows of logits"
            ),
            PlanRow(
                "expert slots", self.num_slots * n.slot, f"{self.num_slots} for {n.total_experts} experts ({share:.0%})"
            ),
        ]


def describe(plan: MemoryPlan) -> str:
    """The plan's rows and its total, a line each; the memories' names too where there is more than one."""
    rows = [*plan.rows(), PlanRow("total", plan.total, f"of {format_bytes(plan.budget)}")]
    spaces = len({row.space for row in rows}) > 1
    lines = [f"{row.name:<14}{format_bytes(row.num_bytes):>12}  {row.note}" for row in rows]
    return "\n".join(f"{row.space:<8}{line}" if spaces else line for row, line in zip(rows, lines))


def make_plan(budget: int, envelope: Envelope, needs: Needs, max_experts: int | None = None) -> MemoryPlan:
    """Give every slot the budget allows; raises BudgetTooSmallError. max_experts: that many slots at most, or, where
    those are all experts, what holds them for good."""
    slots = (budget - needs.fixed) // needs.slot
    if slots < needs.min_slots:
        fixed = f"{format_bytes(needs.fixed)} outside the experts, {needs.min_slots} expert slots at least"
        smallest = format_memory_argument(needs.smallest)
        raise BudgetTooSmallError(format_bytes(budget), needs.smallest, smallest, fixed)
    if max_experts is not None and max_experts < needs.total_experts:
        slots = min(slots, max(max_experts, needs.min_slots))
    return MemoryPlan(budget, envelope, needs, min(slots, needs.max_slots))


def check_available(plan: MemoryPlan, available: int) -> None:
    """Raise BudgetTooLargeError for a plan that this machine could only begin to carry out."""
    if plan.total > available:
        raise BudgetTooLargeError(format_bytes(plan.total), format_bytes(available), format_memory_argument(available))
