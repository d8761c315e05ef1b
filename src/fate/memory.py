"""The memory plan: what a run needs, row by row, and how many expert slots the rest of a budget buys.

Owns sizes and their arithmetic; measures nothing about models (callers pass the rows) and allocates nothing.

>>> format_bytes(parse_memory("1.5GiB"))
'1.50 GiB'
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from fate.core import Envelope
from fate.errors import BudgetTooLargeError, BudgetTooSmallError, ExpertShareError, MemorySizeError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[_letter] = 1024**_power

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
MIB = 1024**2
GIB = 1024**3
DEFAULT_PREFILL_CHUNK = 512  # tokens a forward
RUNTIME_SLACK_BYTES = 32 * MIB  # the measured runtime row differs by some MiB from process to process


def parse_memory(value: str | int | float) -> int:
    """Bytes from "6GiB", "900MB", "4G" (binary) or a number of bytes; raises MemorySizeError."""
    if isinstance(value, bool):
        raise MemorySizeError(value)
    if isinstance(value, (int, float)):
        size = float(value)
    else:
        match = _SIZE.fullmatch(value)
        if match is None or match[2].upper() not in _UNITS:
            raise MemorySizeError(value)
        size = float(match[1]) * _UNITS[match[2].upper()]
    if not math.isfinite(size) or size < 1:
        raise MemorySizeError(value)
    return int(size)


def format_bytes(size: float) -> str:
    """1536 MiB -> '1.50 GiB'."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def format_memory_argument(size: int) -> str:
    """`size` rounded up to whole MiB in the form `--memory` takes."""
    return f"{math.ceil(size / MIB)}MiB"


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """What this process could hold resident in all: free memory (or what its cgroup leaves) plus what it holds; but for
    pages of files, which count as free."""
    meminfo = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    available = int(meminfo["MemAvailable"]) * 1024 + (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
    return min(available, cgroup_limit_bytes() or available)


def cgroup_limit_bytes() -> int | None:
    """The tightest memory limit of this process's cgroups and their parents (v1 or v2), None when there is none."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for level in (group, *group.parents):  # in a container the path is often the host's; the root's file is ours
            if level.is_relative_to(root) and (level / name).is_file():
                text = (level / name).read_text().strip()
                limits += [int(text)] if text.isdigit() else []
    return min((limit for limit in limits if limit < 1 << 60), default=None)


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
class MemoryPlan:
    """A budget divided: `num_slots` slots of `needs.slot` bytes beside the fixed rows."""

    budget: int
    envelope: Envelope
    needs: Needs
    num_slots: int

    @property
    def total(self) -> int:
        return self.needs.fixed + self.num_slots * self.needs.slot

    def rows(self) -> list[tuple[str, int, str]]:
        """(name, bytes, note) for the printed table."""
        n, e = self.needs, self.envelope
        share = min(self.num_slots, n.total_experts) / n.total_experts
        slower_tier = [("records", n.records, "the slower tier, emulated in memory")] if n.records else []
        return [
            *slower_tier,
            ("runtime", n.runtime, "interpreter, torch, transformers"),
            ("dense weights", n.dense, "attention, shared experts, embeddings"),
            ("KV cache", n.kv_cache, f"{e.max_batch} x {e.max_context} tokens"),
            ("buffers", n.buffers, f"{e.max_tokens_per_forward} tokens a forward, {e.logit_rows} rows of logits"),
            ("expert slots", self.num_slots * n.slot, f"{self.num_slots} for {n.total_experts} experts ({share:.0%})"),
        ]


def make_plan(budget: int, envelope: Envelope, needs: Needs, max_experts: int | None = None) -> MemoryPlan:
    """Give every slot the budget allows; raises BudgetTooSmallError. max_experts: that many slots at most, or, where
    those are all experts, what holds them for good."""
    slots = (budget - needs.fixed) // needs.slot
    if slots < needs.min_slots:
        fixed = f"{format_bytes(needs.fixed)} outside the experts, {needs.min_slots} expert slots at least"
        raise BudgetTooSmallError(budget, needs.smallest, fixed)
    if max_experts is not None and max_experts < needs.total_experts:
        slots = min(slots, max(max_experts, needs.min_slots))
    return MemoryPlan(budget, envelope, needs, min(slots, needs.max_slots))


def check_available(plan: MemoryPlan, available: int) -> None:
    """Raise BudgetTooLargeError for a plan that this machine could only begin to carry out."""
    if plan.total > available:
        raise BudgetTooLargeError(plan.total, available)


def parse_experts(value: str | int | float | None, total: int) -> int | None:
    """Expert slots from "25%", 0.25 or 360; raises ExpertShareError for anything that is not a positive share."""
    if value is None:
        return None
    text = str(value).strip()
    try:
        number = float(text[:-1]) / 100 * total if text.endswith("%") else float(text)
    except ValueError:
        raise ExpertShareError(value) from None
    if not text.endswith("%") and ("." in text or isinstance(value, float)):
        number *= total
    if not math.isfinite(number) or number <= 0:
        raise ExpertShareError(value)
    return min(max(1, round(number)), total)
