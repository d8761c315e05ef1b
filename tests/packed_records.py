"""Records of chosen weights, built byte by byte so that kernel tests do not depend on the quantizer."""

from __future__ import annotations

import torch
from torch import Tensor

from fate.core import Precision
from fate.store.dtypes import RAW_DTYPES
from fate.store.format import GROUP, MatrixSpec, RecordLayout, padded_cols

DEPTHS = [("int4", Precision.FULL), ("int4", Precision.INT2), ("int8", Precision.FULL)]


def matrix_layout(codec: str, rows: int, cols: int) -> RecordLayout:
    return RecordLayout(codec, (MatrixSpec("weight", rows, cols),), page_aligned=False)


def expert_layout(codec: str, hidden: int, inner: int, gated: bool = True) -> RecordLayout:
    first = MatrixSpec("gate_up_proj", 2 * inner, hidden) if gated else MatrixSpec("up_proj", inner, hidden)
    return RecordLayout(codec, (first, MatrixSpec("down_proj", hidden, inner)))


def random_record(layout: RecordLayout, seed: int = 0, whole: bool = False) -> Tensor:
    """uint8 [record_bytes]: random codes, scales and offsets, and random bytes wherever nothing should be read.

    whole: scales and offsets are multiples of 1/8 and small, so that sums of them with whole activations are exact.
    """
    generator = torch.Generator().manual_seed(seed)
    record = torch.randint(0, 256, (layout.record_bytes,), dtype=torch.uint8, generator=generator)
    for index, (spec, section) in enumerate(zip(layout.matrices, layout.sections)):
        if layout.is_raw:
            values = torch.randn(spec.weights, generator=generator) / spec.cols**0.5
            put(record, section.high, values.to(RAW_DTYPES[layout.codec]))
            continue
        shape = (spec.rows, padded_cols(spec.cols) // GROUP)
        levels = 255 if layout.codec == "int8" else 15
        if whole:
            scales = torch.randint(1, 3, shape, generator=generator) / 8
            offsets = torch.randint(-16, 17, shape, generator=generator) / 8
        else:
            scales = (0.5 + torch.rand(shape, generator=generator)) * 4.0 / levels
            offsets = -scales * levels / 2 + 0.1 * torch.randn(shape, generator=generator)
        put(record, section.affine, torch.stack((scales, offsets), dim=1).half())
        put(record, 8 * index, torch.tensor([2.0**-5, 1.0 + 0.125 * (index + 1)]))
    return record


def put(record: Tensor, at: int, values: Tensor) -> None:
    raw = values.contiguous().view(torch.uint8).flatten()
    record[at : at + raw.numel()] = raw


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
