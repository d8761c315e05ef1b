"""Products of raw (bf16, fp16, fp32) records: torch's own, on views of the bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fate.kernels.activation import ExpertActivation
from fate.kernels.reference import ExpertBiases, raw_matrix
from fate.store.dtypes import RAW_DTYPES
from fate.store.format import RecordLayout


def linear(x: Tensor, packed: Tensor, layout: RecordLayout, index: int, bias: Tensor | None) -> Tensor:
    """x [M, cols] -> [M, rows]. Where dtypes differ, both are widened to the type that holds either exactly."""
    weights = raw_matrix(packed, layout, index)
    if weights.dtype == x.dtype:
        return F.linear(x, weights, bias)
    wide = torch.promote_types(x.dtype, weights.dtype)
    return F.linear(x.to(wide), weights.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


def experts(
    x: Tensor,
    pool: Tensor,
    layout: RecordLayout,
    slot_offsets: Sequence[int],
    pair_offsets: Sequence[int],
    pairs: Tensor,
    rows: Tensor,
    activation: ExpertActivation,
    biases: ExpertBiases | None,
) -> None:
    """As `fate.kernels.experts`, one expert after the other, in x's dtype like the model's own experts."""
    compute = torch.promote_types(x.dtype, RAW_DTYPES[layout.codec])
    for e, offset in enumerate(slot_offsets):
        start, end = pair_offsets[e], pair_offsets[e + 1]
        if start == end:
            continue
        token, rank = pairs[start:end].long().unbind(1)
        record = pool[offset : offset + layout.record_bytes]
        first, down = (None, None) if biases is None else biases.of(e, compute)
        hidden = activation(linear(x[token].to(compute), record, layout, 0, first))
        rows[token, rank] = linear(hidden, record, layout, 1, down).float()
