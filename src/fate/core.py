"""Value types every other module speaks in. Standard library only; nothing here does any work.

>>> Routing(layer=3, pairs_per_expert={7: 2, 1: 1}).experts
(7, 1)
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class ExpertKey(NamedTuple):
    """One expert of one Mixture-of-Experts layer (`layer` counts MoE layers, in execution order, from 0)."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"layer {self.layer} expert {self.expert}"


class Precision(enum.IntEnum):
    """How deep a record is read. Larger values hold everything smaller ones do.

    INT2 is a prefix of the INT4 record; FULL is the whole record whatever its codec (for a nested record, INT4).
    """

    INT2 = 2
    FULL = 16


class Span(NamedTuple):
    """Rows of one step that belong to one sequence. start: the position of the first. prompt: they are a prompt's, not
    the one next token."""

    sequence: int
    rows: int
    start: int
    prompt: bool


class Routing(NamedTuple):
    """What a router decided for one layer in one step.

    pairs_per_expert: expert id -> number of (token, rank) pairs routed to it with non-zero weight, most popular first.
    tokens: rows the router saw. prefill: some are a prompt's, not one next token of each sequence. gate_weights: of
    each expert, in the same order, the sum of its pairs' weights (empty where nobody said). spans: whose rows they are,
    in order (empty where nobody said).
    """

    layer: int
    pairs_per_expert: dict[int, int]
    tokens: int = 1
    prefill: bool = False
    gate_weights: tuple[float, ...] = ()
    spans: tuple[Span, ...] = ()

    @property
    def experts(self) -> tuple[int, ...]:
        return tuple(self.pairs_per_expert)


class Prediction(NamedTuple):
    """Experts a predictor expects `layer` to need, most confident first, with the confidence of each in [0, 1].

    Confidences order the reads of all layers ahead; 0 means: named, but not worth a read.
    """

    layer: int
    ranked: Sequence[tuple[int, float]]

    @property
    def experts(self) -> tuple[int, ...]:
        return tuple([expert for expert, _ in self.ranked])


@dataclass
class StepStats:
    """Counters of one or more forward passes. Times in seconds, sizes in bytes.

    accesses = hits + misses; a hit is an expert resident (at the precision wanted) when its layer acquired it,
    cached or prefetched. `first_accesses` are those of experts never accessed before. Of the `uncached` experts
    (needed, and not in the layer's cache), `covered` were named by the predictor before routing was known,
    `prefetch_hits` had arrived and `late_prefetches` were on their way. Where the predictor had named experts of a
    layer, `recalled` of the `asked` accesses were among as many of its first as the layer then needed (recall@k).
    `prefetch_used_bytes` of `prefetch_bytes` were acquired by the layer they were read for. `upgrade_bytes` (of all
    bytes) completed INT2 records. For one layer, `total_s` is from its routing to its sum.
    """

    tokens: int = 0
    forwards: int = 0
    accesses: int = 0
    hits: int = 0
    first_accesses: int = 0
    uncached: int = 0
    covered: int = 0
    prefetch_hits: int = 0
    late_prefetches: int = 0
    asked: int = 0
    recalled: int = 0
    evictions: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    prefetch_used_bytes: int = 0
    upgrade_bytes: int = 0
    predict_s: float = 0.0
    stall_s: float = 0.0
    expert_compute_s: float = 0.0
    total_s: float = 0.0

    @property
    def misses(self) -> int:
        return self.accesses - self.hits

    @property
    def hit_rate(self) -> float:
        return self.hits / self.accesses if self.accesses else 0.0

    @property
    def coverage(self) -> float:
        return self.covered / self.uncached if self.uncached else 0.0

    @property
    def recall(self) -> float:
        return self.recalled / self.asked if self.asked else 0.0

    @property
    def bytes_moved(self) -> int:
        return self.demand_bytes + self.prefetch_bytes

    @property
    def wasted_bytes(self) -> int:
        return self.prefetch_bytes - self.prefetch_used_bytes

    @property
    def stall_share(self) -> float:
        return self.stall_s / self.total_s if self.total_s else 0.0

    def __add__(self, other: StepStats) -> StepStats:
        return StepStats(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    def __sub__(self, other: StepStats) -> StepStats:
        return StepStats(**{name: getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class Envelope:
    """What a memory plan covers; anything beyond it is refused with a typed error before it allocates.

    max_context: prompt plus generated tokens of one sequence. max_batch: sequences in one forward.
    prefill_chunk: tokens of one sequence in one forward (never depends on the budget: GEMM rows would differ).
    logit_rows: rows of logits one forward may produce.
    """

    max_context: int
    max_batch: int = 1
    prefill_chunk: int = 512
    logit_rows: int = 512

    @property
    def max_rows_per_forward(self) -> int:
        """Tokens of one sequence in one forward that returns a row of logits for each."""
        return min(self.prefill_chunk, self.logit_rows)

    @property
    def max_tokens_per_forward(self) -> int:
        return self.max_batch * min(self.prefill_chunk, self.max_context)
