"""What the kernels compute, in torch: plain float arithmetic, no speed. Tests run it in float64; it is also what runs
where the compiled extension is missing.

>>> weights = dequantize(packed, layout, index=0)  # [rows, cols] float32
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fate.core import Precision
from fate.kernels.activation import ExpertActivation
from fate.store.dtypes import RAW_DTYPES
from fate.store.format import GROUP, RecordLayout, padded_cols
from fate.store.packing import restore, unpack_plane


def dequantize(
    packed: Tensor,
    layout: RecordLayout,
    index: int,
    precision: Precision = Precision.FULL,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Matrix `index` of a record as numbers.

    packed: uint8 [>= layout.record_bytes]; at INT2 the bytes beyond the prefix are not read.
    Returns [rows, cols] of `dtype`. Raises ValueError where the codec has no INT2 version.
    """
    if precision not in layout.precisions:
        raise ValueError(f"a {layout.codec} record cannot be read at {precision.name}: only at FULL")
    if layout.is_raw:
        return raw_matrix(packed, layout, index).to(dtype)
    spec, section = layout.matrices[index], layout.sections[index]
    padded, groups = padded_cols(spec.cols), padded_cols(spec.cols) // GROUP

    def plane(offset: int, row_bytes: int) -> Tensor:
        return packed[offset : offset + spec.rows * row_bytes].view(spec.rows, row_bytes)

    gain, slope = packed[8 * index : 8 * index + 8].view(torch.float32).to(dtype)
    if layout.codec == "int8":
        codes = restore(plane(section.high, padded)).to(dtype)
    else:
        high = unpack_plane(plane(section.high, padded // 4), padded).to(dtype)
        if precision is Precision.INT2:
            codes = 4 * high + 1.5
            gain = gain * slope
        else:
            assert section.low is not None
            codes = 4 * high + unpack_plane(plane(section.low, padded // 4), padded).to(dtype)
    scales, offsets = (
        plane(section.affine, 4 * groups).view(torch.float16).view(spec.rows, 2, groups).to(dtype).unbind(1)
    )
    values = gain * (scales.unsqueeze(-1) * codes.view(spec.rows, groups, GROUP) + offsets.unsqueeze(-1))
    return values.view(spec.rows, padded)[:, : spec.cols]


def raw_matrix(packed: Tensor, layout: RecordLayout, index: int) -> Tensor:
    """Matrix `index` of a raw record: a view [rows, cols] of the bytes, in the record's dtype."""
    spec, dtype = layout.matrices[index], RAW_DTYPES[layout.codec]
    start = layout.sections[index].high
    return packed[start : start + spec.weights * dtype.itemsize].view(dtype).view(spec.rows, spec.cols)


def linear(
    x: Tensor,
    packed: Tensor,
    layout: RecordLayout,
    index: int = 0,
    precision: Precision = Precision.FULL,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x [M, cols] times the matrix, computed in `dtype`, returned in x's dtype unless `dtype` is wider (float64)."""
    weights = dequantize(packed, layout, index, precision, dtype)
    out = F.linear(x.to(dtype), weights, None if bias is None else bias.to(dtype))
    return out if dtype is torch.float64 else out.to(x.dtype)


@dataclass(frozen=True)
class ExpertBiases:
    """first [experts, rows of the first matrix], in the order of its rows, and down [experts, H], of one dtype.
    numbers: which of these experts each expert of a call is."""

    first: Tensor
    down: Tensor
    numbers: Sequence[int]

    def of(self, e: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both biases of the call's expert e."""
        return self.first[self.numbers[e]].to(dtype), self.down[self.numbers[e]].to(dtype)


def experts(
    x: Tensor,
    pool: Tensor,
    layout: RecordLayout,
    slot_offsets: Sequence[int],
    precisions: Sequence[Precision],
    pair_offsets: Sequence[int],
    pairs: Tensor,
    rows: Tensor,
    activation: ExpertActivation,
    biases: ExpertBiases | None = None,
) -> None:
    """rows[token, rank] = down(activation(first(x))) for each expert's (token, rank) pairs, in the dtype of `rows`."""
    for e, (offset, precision) in enumerate(zip(slot_offsets, precisions)):
        token, rank = pairs[pair_offsets[e] : pair_offsets[e + 1]].long().unbind(1)
        record = pool[offset : offset + layout.record_bytes]
        first, down = (dequantize(record, layout, index, precision, rows.dtype) for index in (0, 1))
        first_bias, down_bias = (None, None) if biases is None else biases.of(e, rows.dtype)
        hidden = activation(F.linear(x[token].to(rows.dtype), first, first_bias))
        rows[token, rank] = F.linear(hidden, down, down_bias)


def reduce_rows(rows: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over ranks, in rank order, of weights [M, k] times rows [M, k, H]; ranks of weight zero are skipped."""
    total = torch.zeros_like(rows[:, 0])
    for rank in range(rows.shape[1]):
        weight = weights[:, rank, None].to(rows.dtype)
        total += torch.where(weight == 0, torch.zeros_like(total), weight * rows[:, rank])
    return total.to(dtype)


def gather_rows(packed: Tensor, layout: RecordLayout, index: int, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [n] of the matrix: [n, cols] of `dtype`."""
    return dequantize(packed, layout, index)[ids].to(dtype)
