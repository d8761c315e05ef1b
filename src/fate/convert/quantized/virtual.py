"""A weight that is computed from packed tensors when it is read, and what the schemes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fate.convert.checkpoint import Checkpoint
from fate.errors import UnsupportedModelError


@dataclass(frozen=True)
class Virtual:
    """shape, dtype: of the dequantized weight. parts: the keys it is packed in. read_rows: elements `start:stop` of the
    first dimension, in float32 or `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[str, ...]
    read_rows: Callable[[int, int], torch.Tensor]


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What the dequantized weights are rounded to: the config's dtype, bfloat16 where it names none."""
    config: dict[str, Any] = {**checkpoint.config, **(checkpoint.config.get("text_config") or {})}
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.bfloat16


def unpack_int32(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The unsigned fields of int32 words along `dim`, lowest first: `dim` becomes 32 / bits times as long."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    words = packed.unsqueeze(dim + 1)
    fields = (words >> shifts.view([-1 if at == dim + 1 else 1 for at in range(words.ndim)])) & (2**bits - 1)
    return fields.flatten(dim, dim + 1)


def require_bits(path: object, method: str, bits: object, known: tuple[int, ...]) -> int:
    if bits not in known:
        raise UnsupportedModelError(
            f"{path} is quantized by {method} with {bits} bits: {' or '.join(map(str, known))} are read; convert the "
            "unquantized checkpoint it was made from"
        )
    return int(str(bits))
