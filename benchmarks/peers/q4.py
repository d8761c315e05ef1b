"""INT4 matrices of a record as GGUF blocks of 32 weights, which is how llama.cpp stores 4 bits.

Q4_1: float16 d and m, then 16 bytes of codes; a weight is d * q + m. A group of 64 becomes two blocks with the same
codes, exact but for the rounding of gain * a and gain * b to float16. Q4_0: float16 d and 16 bytes; d * (q - 8), which
is another quantization, made as ggml's reference makes it. Byte j of a block holds codes j and j + 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fate.store.format import GROUP, RecordLayout, padded_cols
from fate.store.packing import unpack_plane

BLOCK = 32
BLOCK_BYTES = {"q4_1": 20, "q4_0": 18}
SLICE_WEIGHTS = 1 << 24  # unpacked at a time


@dataclass(frozen=True)
class Affine:
    """codes uint8 [rows, cols]; scale and offset float32 [rows, groups]: a weight is scale * code + offset."""

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def weights(self) -> Tensor:
        """float32 [rows, cols]."""
        rows, cols = self.codes.shape
        grouped = self.codes.view(rows, -1, GROUP).float()
        return (grouped * self.scale[..., None] + self.offset[..., None]).view(rows, cols)


def blocks(record: Tensor, layout: RecordLayout, index: int, form: str) -> tuple[Tensor, float]:
    """Matrix `index` of an int4 record as (uint8 [rows, bytes of a row], what rounding d and m changed).

    form: a key of BLOCK_BYTES. The second value is the largest change of a weight over its group's range; 0 for q4_0,
    where it means nothing. The matrix's columns are whole groups.
    """
    rows, cols = layout.matrices[index].rows, layout.matrices[index].cols
    step = max(1, SLICE_WEIGHTS // cols)
    pieces, rounding = [], 0.0
    for first in range(0, rows, step):
        affine = unpack(record, layout, index, first, min(first + step, rows))
        if form == "q4_1":
            pieces.append(_q4_1(affine))
            rounding = max(rounding, _rounding(affine))
        else:
            pieces.append(q4_0(affine.weights()))
    return torch.cat(pieces), rounding


def unpack(record: Tensor, layout: RecordLayout, index: int, first: int, stop: int) -> Affine:
    """Rows first:stop of a matrix of an int4 record."""
    matrix, section = layout.matrices[index], layout.sections[index]
    assert section.low is not None
    assert matrix.cols == padded_cols(matrix.cols)
    gain = record[8 * index : 8 * index + 4].view(torch.float32)

    def rows_of(offset: int, row_bytes: int) -> Tensor:
        return record[offset + first * row_bytes : offset + stop * row_bytes].view(stop - first, row_bytes)

    high, low = (unpack_plane(rows_of(at, matrix.cols // 4), matrix.cols) for at in (section.high, section.low))
    affine = rows_of(section.affine, matrix.cols // GROUP * 4).view(torch.float16).view(stop - first, 2, -1).float()
    return Affine(high << 2 | low, gain * affine[:, 0], gain * affine[:, 1])


def _q4_1(affine: Affine) -> Tensor:
    rows = len(affine.codes)
    scale, offset = (
        _as_bytes(values.repeat_interleave(GROUP // BLOCK, dim=1)) for values in (affine.scale, affine.offset)
    )
    return torch.cat((scale, offset, _nibbles(affine.codes)), dim=-1).view(rows, -1)


def q4_0(weights: Tensor) -> Tensor:
    rows, cols = weights.shape
    grouped = weights.view(rows, cols // BLOCK, BLOCK)
    least, most = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    largest = torch.where(-least > most, least, most)
    scale = largest / -8
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    codes = (grouped * inverse + 8.5).clamp_(0, 15).to(torch.uint8)
    return torch.cat((_as_bytes(scale[..., 0]), _nibbles(codes.view(rows, cols))), dim=-1).view(rows, -1)


def _as_bytes(values: Tensor) -> Tensor:
    """float16 bytes of [rows, blocks] values: uint8 [rows, blocks, 2]."""
    return values.half().view(torch.uint8).view(*values.shape, 2)


def _nibbles(codes: Tensor) -> Tensor:
    """uint8 [rows, blocks, 16]."""
    halves = codes.view(len(codes), -1, 2, BLOCK // 2)
    return halves[:, :, 0] | halves[:, :, 1] << 4


def _rounding(affine: Affine) -> float:
    """Largest change of a weight by rounding to float16, over 15 steps of its scale."""
    change = 15 * (affine.scale.half().float() - affine.scale).abs()
    change += (affine.offset.half().float() - affine.offset).abs()
    spread = 15 * affine.scale
    return float(torch.where(spread > 0, change / spread, 0.0).max())
