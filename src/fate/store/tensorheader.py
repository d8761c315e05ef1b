"""Reads the header of a safetensors file: which tensors it holds, and where. Without torch.

>>> header = read_tensor_header(Path("qwen.fate/packed.safetensors"))
>>> header.data_start, header.tensors[0].start
(8192, 0)
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAX_HEADER_BYTES = 100 * 1000 * 1000  # the safetensors specification's own limit


class TensorHeaderError(Exception):
    """What is wrong with a file, worded to follow its name."""


@dataclass(frozen=True)
class TensorSpan:
    """One tensor: `dtype` by its name in the file, bytes [start, end) of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorHeader:
    """text: the JSON as it is in the file, padding included. tensors: in the order of their data."""

    text: bytes
    tensors: tuple[TensorSpan, ...]

    @property
    def data_start(self) -> int:
        return 8 + len(self.text)

    @property
    def data_bytes(self) -> int:
        return max((tensor.end for tensor in self.tensors), default=0)


def read_tensor_header(file: Path) -> TensorHeader:
    """Raises TensorHeaderError and OSError; whether the data is all there is for the caller to see."""
    with file.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            raise TensorHeaderError("is not a safetensors file")
        if size < 8 + length:
            raise TensorHeaderError(f"is cut short within its header ({size} bytes)")
        text = f.read(length)
    try:
        table = json.loads(text)
        tensors = [_span(name, entry) for name, entry in table.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TensorHeaderError(f"has a corrupt header ({error})") from error
    return TensorHeader(text, tuple(sorted(tensors, key=lambda tensor: tensor.end)))


def _span(name: str, entry: Any) -> TensorSpan:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if type(start) is not int or type(end) is not int or not 0 <= start <= end:
        raise ValueError(f"{name} spans {start}:{end}")
    if any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"{name} has shape {list(shape)}")
    return TensorSpan(name, str(entry["dtype"]), shape, start, end)
