"""Matrices to records: quantize, choose constants, write the sections of `store/format.py`.

>>> layout = RecordLayout("int4", (MatrixSpec("gate_up_proj", 2816, 2048), MatrixSpec("down_proj", 2048, 1408)))
>>> record = encode_record({"gate_up_proj": gate_up, "down_proj": down}, layout)  # uint8 [layout.record_bytes]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fate.convert import hqq
from fate.kernels import native
from fate.store.dtypes import RAW_DTYPES
from fate.store.format import GROUP, MatrixSpec, RecordLayout, Section, padded_cols
from fate.store.packing import order, pack_plane

_BLOCK_WEIGHTS = 1 << 18  # weights quantized at a time: bounds the temporaries to a few MB
# Scales and offsets of weights in [-1, 1] are stored times 2^HEADROOM: far from both ends of float16's range.
_HEADROOM = 13


def encode_record(matrices: Mapping[str, Tensor], layout: RecordLayout, unit: float | None = None) -> Tensor:
    """One record, uint8 [layout.record_bytes], from its matrices by name, each float [rows, cols].

    unit: `common_unit` of what the matrices are parts of; None: each matrix is whole.
    Temporaries stay within a few MB. Raises ValueError for a missing matrix, a wrong shape or non-finite weights.
    """
    record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
    for index, (spec, section) in enumerate(zip(layout.matrices, layout.sections)):
        matrix = matrices.get(spec.name)
        if matrix is None or matrix.shape != (spec.rows, spec.cols):
            found = None if matrix is None else tuple(matrix.shape)
            raise ValueError(f"matrix {spec.name} has shape {found}: the layout needs [{spec.rows}, {spec.cols}]")
        if layout.is_raw:
            raw = matrix.to(RAW_DTYPES[layout.codec]).contiguous().view(torch.uint8).flatten()
            record[section.high : section.high + raw.numel()] = raw
        else:
            constants = _quantize_into(record, matrix, spec, section, layout.codec, unit)
            record[8 * index : 8 * index + 8] = torch.tensor(constants, dtype=torch.float32).view(torch.uint8)
    return record


def quantize_matrix(matrix: Tensor, codec: str) -> Tensor:
    """One float [rows, cols] matrix as a record of its own without page padding: uint8."""
    spec = MatrixSpec("weight", *matrix.shape)
    return encode_record({spec.name: matrix}, RecordLayout(codec, (spec,), page_aligned=False))


def _quantize_into(
    record: Tensor, matrix: Tensor, spec: MatrixSpec, section: Section, codec: str, unit: float | None
) -> tuple[float, float]:
    """Writes the planes and the affine section of one matrix; returns its (gain, slope)."""
    if matrix.dtype not in native.DTYPE_CODES:
        matrix = matrix.float()
    if unit is None:
        unit = common_unit([matrix], spec.name)
    run = _quantize_torch if native.extension() is None else _quantize_compiled
    squares, products = run(record, matrix, section, codec, unit)
    return math.ldexp(unit, -_HEADROOM), 1.0 if codec == "int8" else _slope(squares, products)


def _quantize_compiled(
    record: Tensor, matrix: Tensor, section: Section, codec: str, unit: float
) -> tuple[float, float]:
    """`_quantize_torch` in C++: the same steps, one row at a time."""
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    base = record.data_ptr()
    return native.extension().quantize_matrix(
        matrix.data_ptr(),
        native.DTYPE_CODES[matrix.dtype],
        matrix.stride(0),
        *matrix.shape,
        1 / unit,
        _HEADROOM,
        (hqq.ITERATIONS, hqq.P, hqq.BETA, hqq.KAPPA),
        base + section.high,
        base + section.affine,
        0 if section.low is None else base + section.low,
        torch.get_num_threads(),
    )


def _quantize_torch(record: Tensor, matrix: Tensor, section: Section, codec: str, unit: float) -> tuple[float, float]:
    """Writes the planes and the affine section; returns the sums of w * w and w * w_int2, in units of unit^2."""
    rows, cols = matrix.shape
    step = max(1, _BLOCK_WEIGHTS // cols)
    squares = products = 0.0
    for first in range(0, rows, step):
        block = matrix[first : first + step].float().contiguous() / unit
        codes, affine = _quantize_block(block, codec)
        width = codes.shape[1]
        _write(record, section.affine + first * affine.shape[1], affine)
        if codec == "int8":
            _write(record, section.high + first * width, order(codes))
            continue
        assert section.low is not None
        high = codes >> 2
        _write(record, section.high + first * width // 4, pack_plane(high))
        _write(record, section.low + first * width // 4, pack_plane(codes & 3))
        scales, offsets = (affine.view(torch.float16).float() * 2.0**-_HEADROOM).view(len(block), 2, -1, 1).unbind(1)
        coarse = scales * (4.0 * high.view(len(block), -1, GROUP) + 1.5) + offsets
        squares += float(block.square().sum(dtype=torch.float64))
        products += float((block * coarse.view(len(block), -1)[:, :cols]).sum(dtype=torch.float64))
    return squares, products


def common_unit(pieces: Iterable[Tensor], name: str) -> float:
    """The power of two at or above the largest magnitude of all pieces of a matrix; 1 for zeros."""
    largest = 0.0
    for piece in pieces:
        of_piece = _largest(piece)
        if not math.isfinite(of_piece):
            raise ValueError(f"matrix {name} holds infinite or NaN weights: the checkpoint is damaged")
        largest = max(largest, of_piece)
    return math.ldexp(1.0, max(-100, math.frexp(largest)[1])) if largest > 0 else 1.0


def _largest(matrix: Tensor) -> float:
    """The largest magnitude; infinite or NaN where a weight is."""
    extension = native.extension()
    if extension is None or matrix.dtype not in native.DTYPE_CODES or matrix.stride(1) != 1:
        return float(torch.linalg.vector_norm(matrix, math.inf, dtype=torch.float32))
    dtype = native.DTYPE_CODES[matrix.dtype]
    return extension.largest_magnitude(matrix.data_ptr(), dtype, matrix.stride(0), *matrix.shape)


def _quantize_block(block: Tensor, codec: str) -> tuple[Tensor, Tensor]:
    """(codes uint8 [rows, padded], affine bytes [rows, 4 * groups]) of weights in [-1, 1], float32 [rows, cols]."""
    rows, cols = block.shape
    groups, whole = padded_cols(cols) // GROUP, cols // GROUP
    codes = torch.zeros(rows, groups, GROUP, dtype=torch.uint8)
    affine = torch.zeros(rows, 2, groups, dtype=torch.float16)
    pieces = [(0, whole, block[:, : whole * GROUP].reshape(-1, GROUP))]
    if whole < groups:
        pieces.append((whole, groups, block[:, whole * GROUP :]))
    for first, last, values in pieces:
        if first == last:
            continue
        _, scale, offset = hqq.minmax8(values) if codec == "int8" else hqq.solve(values)
        stored = (torch.stack((scale, offset)) * 2.0**_HEADROOM).half()
        affine[:, :, first:last] = stored.view(2, rows, last - first).transpose(0, 1)
        levels = 255 if codec == "int8" else 15
        codes[:, first:last, : values.shape[1]] = _round_codes(values, stored, levels).view(rows, last - first, -1)
    return codes.view(rows, -1), affine.view(torch.uint8).view(rows, -1)


def _round_codes(values: Tensor, stored: Tensor, levels: int) -> Tensor:
    """Nearest codes under the scales and offsets as stored, so that float16 rounding costs no extra error."""
    scale, offset = (stored.float() * 2.0**-_HEADROOM).unsqueeze(-1)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return ((values - offset) * inverse).round_().clamp_(0, levels).to(torch.uint8)


def _slope(squares: float, products: float) -> float:
    """<w, w> / <w, w_int2>, the factor that keeps the INT2 version unbiased; 1 where that means nothing."""
    slope = squares / products if products > 0 else 1.0
    return slope if math.isfinite(slope) and 0.25 <= slope <= 4.0 else 1.0


def _write(record: Tensor, at: int, values: Tensor) -> None:
    flat = values.reshape(-1)
    record[at : at + flat.numel()] = flat
