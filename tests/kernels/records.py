"""Records of random weights for kernel tests, built byte by byte so that they do not depend on the quantizer."""

from __future__ import annotations

import torch
from torch import Tensor

from fate.kernels.reference import RAW_DTYPES
from fate.store.format import GROUP, MatrixSpec, RecordLayout, padded_cols


def random_record(layout: RecordLayout, seed: int = 0) -> Tensor:
    """uint8 [record_bytes]: random codes, scales and offsets, and random bytes wherever nothing should be read."""
    generator = torch.Generator().manual_seed(seed)
    record = torch.randint(0, 256, (layout.record_bytes,), dtype=torch.uint8, generator=generator)
    for index, (spec, section) in enumerate(zip(layout.matrices, layout.sections)):
        if layout.is_raw:
            values = torch.randn(spec.weights, generator=generator) / spec.cols**0.5
            raw = values.to(RAW_DTYPES[layout.codec]).view(torch.uint8)
            record[section.high : section.high + raw.numel()] = raw
            continue
        groups = padded_cols(spec.cols) // GROUP
        levels = 255 if layout.codec == "int8" else 15
        scales = (0.5 + torch.rand(spec.rows, groups, generator=generator)) * 4.0 / levels
        offsets = -scales * levels / 2 + 0.1 * torch.randn(spec.rows, groups, generator=generator)
        affine = torch.stack((scales, offsets), dim=1).half().view(torch.uint8).flatten()
        record[section.affine : section.affine + affine.numel()] = affine
        constants = torch.tensor([2.0**-5, 1.0 + 0.125 * index])
        record[8 * index : 8 * index + 8] = constants.view(torch.uint8)
    return record


def matrix_layout(codec: str, rows: int, cols: int) -> RecordLayout:
    return RecordLayout(codec, (MatrixSpec("weight", rows, cols),), page_aligned=False)


def expert_layout(codec: str, hidden: int, inner: int) -> RecordLayout:
    return RecordLayout(
        codec, (MatrixSpec("gate_up_proj", 2 * inner, hidden), MatrixSpec("down_proj", hidden, inner))
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())
