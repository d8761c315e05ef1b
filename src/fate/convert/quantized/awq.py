"""AWQ (its GEMM layout): integers of 4 bits with a scale and a zero point for every group of the reduction.

`X.weight` [output, reduction] is made of `X.qweight` int32 [reduction, output / 8], `X.qzeros` int32
[groups, output / 8] and `X.scales` [groups, output]. The eight fields of a word hold outputs 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fate.convert.checkpoint import Checkpoint
from fate.convert.quantized.virtual import Virtual, model_dtype, require_bits, unpack_int32
from fate.errors import UnsupportedModelError

_FIELD_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)


def find(checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, Virtual]:
    require_bits(checkpoint.path, "AWQ", settings.get("bits", settings.get("w_bit", 4)), (4,))
    if (layout := str(settings.get("version", "gemm")).lower()) != "gemm":
        raise UnsupportedModelError(
            f"{checkpoint.path} is quantized by AWQ in its layout {layout!r}: only 'gemm' is read; convert the "
            "unquantized checkpoint it was made from"
        )
    dtype, weights = model_dtype(checkpoint), {}
    keys = checkpoint.keys()
    for key in sorted(key for key in keys if key.endswith(".qweight")):
        name = key.removesuffix(".qweight")
        cols, words = checkpoint.shape(key)
        parts = tuple(f"{name}.{end}" for end in ("qweight", "qzeros", "scales"))
        weights[f"{name}.weight"] = Virtual((words * 8, cols), dtype, parts, partial(_read_rows, checkpoint, name))
    return weights


def _read_rows(checkpoint: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
    codes = _outputs(checkpoint.read(f"{name}.qweight"))[:, start:stop]  # [reduction, rows]
    zeros = _outputs(checkpoint.read(f"{name}.qzeros"))[:, start:stop]
    scales = checkpoint.read(f"{name}.scales")[:, start:stop].float()
    group = torch.arange(len(codes)) * len(scales) // len(codes)
    return (scales[group] * (codes - zeros[group])).T.contiguous()


def _outputs(packed: torch.Tensor) -> torch.Tensor:
    fields = unpack_int32(packed, 4, dim=1).unflatten(1, (-1, 8))
    return fields[..., list(_FIELD_OF_OUTPUT)].flatten(1)
