"""The rows of one use of a layer's experts: which expert computes which of them, and their sum.

`RoutedBatch` holds a few rows that native routing has grouped; `ExpertBatch` any number, grouped by torch. Both compute
experts in groups as they arrive. Every pair has a row of its own, and rows are summed in rank order at the end, so
arrival never changes a bit of the result.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from fate import kernels
from fate.core import Precision
from fate.engine.residency import Slot
from fate.engine.slots import SlotPool
from fate.kernels import decode, native
from fate.store.format import RecordLayout


class Batch(Protocol):
    """pairs_per_expert, gate_weights: see `Routing`. rows: tokens."""

    rows: int
    pairs_per_expert: dict[int, int]
    gate_weights: tuple[float, ...]

    def compute(self, group: list[Slot], *, first: bool, last: bool) -> None:
        """Compute the pairs of the experts in these slots. The last call of a batch also sums."""

    def result(self) -> Tensor:
        """[rows, ..., hidden], after the last call."""


class RoutedBatch:
    """Rows that `kernels.decode` has routed and keeps in its buffers. out: [rows, ..., hidden]."""

    def __init__(
        self, half: decode.ExpertHalf, routed: decode.Routed, buffers: decode.Buffers, out: Tensor, add_residual: bool
    ) -> None:
        self.rows = out.shape[0]
        self.pairs_per_expert = dict(zip(routed.experts, routed.pairs))
        self.gate_weights = tuple(routed.weights)
        self._half, self._buffers, self._add_residual = half, buffers, add_residual
        self._out = out

    def compute(self, group: list[Slot], *, first: bool, last: bool) -> None:
        if not (group or last or (first and self._half.has_shared)):
            return
        in_full = all(entry.precision is Precision.FULL for entry in group)
        self._half(
            self._buffers,
            self.rows,
            [entry.key.expert for entry in group],
            [entry.slot for entry in group],
            None if in_full else [_held(entry) for entry in group],
            first=first,
            last=last,
            out=self._out if last else None,
            add_residual=self._add_residual,
        )

    def result(self) -> Tensor:
        return self._out


class ExpertCode:
    """What a layer's experts compute. activation: None where no kernel knows it, and the module computes it itself."""

    def __init__(self, module: Any, layout: RecordLayout, activation: kernels.ExpertActivation | None) -> None:
        self.module = module
        self.layout = layout
        self.activation = activation
        self._first = "gate_up_proj" if module.has_gate else "up_proj"

    @property
    def is_native(self) -> bool:
        """Whether `kernels.decode.ExpertHalf` computes them: packed, with a known activation and no norm after it."""
        packed = not self.layout.is_raw and native.extension() is not None
        return packed and self.activation is not None and not self.module.has_post_expert_norm

    @property
    def biases(self) -> tuple[Tensor, Tensor] | None:
        if not self.module.has_bias:
            return None
        return getattr(self.module, f"{self._first}_bias"), self.module.down_proj_bias

    def linear(self, x: Tensor, record: Tensor, index: int, precision: Precision, expert: int) -> Tensor:
        """Matrix `index` of one expert, and its bias."""
        out = kernels.linear(x, record, self.layout, index, precision)
        return out if self.biases is None else out + self.biases[index][expert]


class ExpertBatch:
    """x [tokens, hidden], index and weights [tokens, rank]. Pairs of weight zero and sentinel indices are dropped."""

    def __init__(
        self, code: ExpertCode, pool: SlotPool, x: Tensor, index: Tensor, weights: Tensor, num_experts: int
    ) -> None:
        tokens, ranks = index.shape
        self.rows = tokens
        self._code, self._pool, self._x = code, pool, x
        self._out = torch.empty(tokens, ranks, x.shape[-1], dtype=torch.float32)  # a row of each pair
        dropped = (weights == 0) | (index >= num_experts)
        self._weights = weights.masked_fill(dropped, 0)
        experts = index.masked_fill(dropped, num_experts).reshape(-1)
        ordered, order = experts.sort(stable=True)  # by expert, then token, then rank
        counts = torch.bincount(ordered, minlength=num_experts + 1)[:num_experts]
        sums = torch.zeros(num_experts + 1).index_add_(0, experts, self._weights.reshape(-1).float())
        self._pairs = torch.stack([order // ranks, order % ranks], dim=1).to(torch.int32)
        by_popularity = counts.argsort(descending=True, stable=True).tolist()
        counted, end_of = counts.tolist(), counts.cumsum(0).tolist()
        self.pairs_per_expert = {e: counted[e] for e in by_popularity if counted[e]}
        self.gate_weights = tuple(sums[list(self.pairs_per_expert)].tolist())
        self._span = {e: (end_of[e] - counted[e], end_of[e]) for e in self.pairs_per_expert}

    def compute(self, group: list[Slot], *, first: bool, last: bool) -> None:
        if not group:
            return
        if self._code.activation is None:
            for entry in group:
                self._compute_by_module(entry)
            return
        numbers = [entry.key.expert for entry in group]
        bounds, pairs = self._pairs_of(numbers)
        biases = self._code.biases
        kernels.experts(
            self._x,
            self._pool.tensor,
            self._code.layout,
            [self._pool.offset(entry.slot) for entry in group],
            [_held(entry) for entry in group],
            bounds,
            pairs,
            self._out,
            self._code.activation,
            None if biases is None else kernels.ExpertBiases(*biases, numbers),
        )
        if self._code.module.has_post_expert_norm:
            for start, end in pairwise(bounds):  # one by one: the same bits whatever has arrived together
                self._normalize(*pairs[start:end].long().unbind(1))

    def result(self) -> Tensor:
        return kernels.reduce_rows(self._out, self._weights, self._x.dtype)

    def _pairs_of(self, experts: list[int]) -> tuple[list[int], Tensor]:
        """(bounds [experts + 1], int32 [pairs, 2] of (token, rank)) of these experts, in their order."""
        bounds, pieces = [0], []
        for expert in experts:
            start, end = self._span[expert]
            pieces.append(self._pairs[start:end])
            bounds.append(bounds[-1] + end - start)
        return bounds, pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)

    def _compute_by_module(self, entry: Slot) -> None:
        """An activation that no kernel knows: packed matrices around the module's own code."""
        code, expert, precision = self._code, entry.key.expert, _held(entry)
        tokens, ranks = self._pairs_of([expert])[1].long().unbind(1)
        record = self._pool.tensor[self._pool.offset(entry.slot) :][: code.layout.record_bytes]
        hidden = code.linear(self._x[tokens], record, 0, precision, expert)
        hidden = code.module._apply_gate(hidden) if code.module.has_gate else code.module.act_fn(hidden)
        self._out[tokens, ranks] = code.linear(hidden.contiguous(), record, 1, precision, expert).float()
        if code.module.has_post_expert_norm:
            self._normalize(tokens, ranks)

    def _normalize(self, tokens: Tensor, ranks: Tensor) -> None:
        out = self._out[tokens, ranks].to(self._x.dtype)
        self._out[tokens, ranks] = self._code.module.post_expert_norm(out).float()


def _held(entry: Slot) -> Precision:
    assert entry.precision is not None, "a lease yields experts that have landed"
    return entry.precision
