"""MXFP4 as gpt-oss has it: FP4 (E2M1) in blocks of 32 along the reduction, one power of two for each.

`X` [experts, reduction, output] is made of `X_blocks` uint8 [experts, output, groups, 16], two values a byte with the
lower nibble first, and `X_scales` uint8 [experts, output, groups], the exponent plus 127.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fate.convert.checkpoint import Checkpoint
from fate.convert.quantized.virtual import Virtual, model_dtype

_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def find(checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, Virtual]:
    keys, dtype = set(checkpoint.keys()), model_dtype(checkpoint)
    weights = {}
    for blocks in sorted(key for key in keys if key.endswith("_blocks")):
        name = blocks.removesuffix("_blocks")
        if (scales := f"{name}_scales") in keys:
            experts, rows, groups, half = checkpoint.shape(blocks)
            shape = (experts, groups * half * 2, rows)
            weights[name] = Virtual(shape, dtype, (blocks, scales), partial(_read_rows, checkpoint, blocks, scales))
    return weights


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] -> float32 [..., 2 n]."""
    return torch.stack((_FP4[(packed & 15).long()], _FP4[(packed >> 4).long()]), dim=-1).flatten(-2)


def _read_rows(checkpoint: Checkpoint, blocks: str, scales: str, start: int, stop: int) -> torch.Tensor:
    values = unpack_fp4(checkpoint.read_rows(blocks, start, stop))  # [experts, output, groups, 32]
    exponents = checkpoint.read_rows(scales, start, stop).int() - 127
    return torch.ldexp(values, exponents.unsqueeze(-1)).flatten(2).transpose(1, 2).contiguous()
