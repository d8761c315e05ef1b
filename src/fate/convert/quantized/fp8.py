"""FP8 with a scale for every block of a matrix (DeepSeek-V3), or one for the whole of it; experts may also be packed
as two FP4 values a byte with a scale for every 32 (DeepSeek-V4).

`X` is made of `X` (float8, or int8 for FP4) and `X_scale_inv` or `X_scale`: float32, or powers of two as E8M0.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fate.convert.checkpoint import Checkpoint
from fate.convert.quantized.mxfp4 import unpack_fp4
from fate.convert.quantized.virtual import Virtual, model_dtype
from fate.errors import CheckpointError

_SUFFIXES = ("_scale_inv", "_scale")
_UNUSED = ("activation_scale", "input_scale")


def find(checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, Virtual]:
    keys, dtype = set(checkpoint.keys()), model_dtype(checkpoint)
    block = settings.get("weight_block_size")
    weights = {}
    for key in sorted(keys):
        scale = next((key + suffix for suffix in _SUFFIXES if key + suffix in keys), None)
        if scale is None:
            continue
        stem = key.rpartition(".")[0]
        unused = tuple(name for name in (f"{stem}.{end}" for end in _UNUSED) if name in keys)
        shape = list(checkpoint.shape(key))
        if checkpoint.dtype(key) is torch.int8:
            shape[-1] *= 2
        sizes = _block(key, shape, checkpoint.shape(scale), block)
        read = partial(_read_rows, checkpoint, key, scale, sizes)
        weights[key] = Virtual(tuple(shape), dtype, (key, scale, *unused), read)
    return weights


def _block(key: str, shape: list[int], grid: tuple[int, ...], block: Any) -> tuple[int, int]:
    """(rows, columns) of a block: what the config says if the grid agrees, else what divides the matrix evenly."""
    rows, cols = shape[-2:]
    if len(grid) < 2:
        return rows, cols
    if block and (-(-rows // block[0]), -(-cols // block[1])) == tuple(grid[-2:]):
        return int(block[0]), int(block[1])
    if rows % grid[-2] == 0 and cols % grid[-1] == 0:
        return rows // grid[-2], cols // grid[-1]
    raise CheckpointError(f"{key} of shape {shape} has a grid of {list(grid)} scales: download the checkpoint again")


def _read_rows(
    checkpoint: Checkpoint, key: str, scale: str, block: tuple[int, int], start: int, stop: int
) -> torch.Tensor:
    if len(checkpoint.shape(key)) == 3:  # stacked experts
        grid = _scales(checkpoint.read_rows(scale, start, stop))
        first = 0
    else:
        grid = _scales(checkpoint.read(scale))
        first = start
    values = _values(checkpoint.read_rows(key, start, stop))
    if grid.ndim < 2:
        return values * grid.reshape(-1, 1, 1) if values.ndim == 3 and grid.numel() > 1 else values * grid.reshape(())
    rows = torch.arange(first, first + values.shape[-2]) // block[0]
    cols = torch.arange(values.shape[-1]) // block[1]
    return values * grid[..., rows, :][..., cols]


def _values(packed: torch.Tensor) -> torch.Tensor:
    return unpack_fp4(packed.view(torch.uint8)) if packed.dtype is torch.int8 else packed.float()


def _scales(stored: torch.Tensor) -> torch.Tensor:
    return (stored.float() - 127).exp2() if stored.dtype is torch.uint8 else stored.float()
