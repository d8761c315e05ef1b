"""GPTQ: integers of 2, 4 or 8 bits with a scale and a zero point for every group of the reduction.

`X.weight` [output, reduction] is made of `X.qweight` int32 [reduction / fields, output], `X.qzeros` int32
[groups, output / fields], `X.scales` [groups, output] and `X.g_idx` [reduction], the group of each column. Zero points
are stored less one, unless the checkpoint's format is `gptq_v2`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fate.convert.checkpoint import Checkpoint
from fate.convert.quantized.virtual import Virtual, model_dtype, require_bits, unpack_int32

BITS = (2, 4, 8)


def find(checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, Virtual]:
    bits = require_bits(checkpoint.path, "GPTQ", settings.get("bits"), BITS)
    shift = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    keys, dtype = set(checkpoint.keys()), model_dtype(checkpoint)
    weights = {}
    for key in sorted(key for key in keys if key.endswith(".qweight")):
        name = key.removesuffix(".qweight")
        words, rows = checkpoint.shape(key)
        parts = tuple(
            part for part in (f"{name}.{end}" for end in ("qweight", "qzeros", "scales", "g_idx")) if part in keys
        )
        read = partial(_read_rows, checkpoint, name, bits, shift, f"{name}.g_idx" in keys)
        weights[f"{name}.weight"] = Virtual((rows, words * 32 // bits), dtype, parts, read)
    return weights


def _read_rows(
    checkpoint: Checkpoint, name: str, bits: int, shift: int, ordered: bool, start: int, stop: int
) -> torch.Tensor:
    codes = unpack_int32(checkpoint.read(f"{name}.qweight")[:, start:stop], bits, dim=0)  # [reduction, rows]
    zeros = unpack_int32(checkpoint.read(f"{name}.qzeros"), bits, dim=1)[:, start:stop] + shift
    scales = checkpoint.read(f"{name}.scales")[:, start:stop].float()
    if ordered:
        group = checkpoint.read(f"{name}.g_idx").long()
    else:
        group = torch.arange(len(codes)) * len(scales) // len(codes)
    return (scales[group] * (codes - zeros[group])).T.contiguous()
