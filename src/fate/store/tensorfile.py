"""The layout of a safetensors file that is written in place, tensor by tensor, in any order.

The header is computed first, so every tensor's offset is known before any is made. Files are valid for the safetensors
library: tensors follow each other without holes. Widest items come first so that each tensor is naturally aligned, and
the header is padded with spaces so that data starts on a page.

>>> layout = TensorFileLayout((TensorEntry("b", torch.uint8, (64,)), TensorEntry("a", torch.uint8, (128,))), {})
>>> layout.span("b")
(4096, 64)
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property

import torch

from fate.store.dtypes import SAFETENSORS_NAMES
from fate.store.format import PAGE_BYTES, align_up


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorFileLayout:
    """Header bytes and tensor offsets of one safetensors file."""

    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str]

    @cached_property
    def _ordered(self) -> tuple[TensorEntry, ...]:
        return tuple(sorted(self.entries, key=lambda entry: -entry.dtype.itemsize))

    @cached_property
    def header(self) -> bytes:
        """The length field and padded JSON; data follows."""
        table: dict[str, object] = {"__metadata__": self.metadata} if self.metadata else {}
        at = 0
        for entry in self._ordered:
            table[entry.key] = {
                "dtype": SAFETENSORS_NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [at, at + entry.nbytes],
            }
            at += entry.nbytes
        text = json.dumps(table, separators=(",", ":")).encode()
        length = align_up(8 + len(text), PAGE_BYTES) - 8
        return length.to_bytes(8, "little") + text.ljust(length)

    @cached_property
    def _spans(self) -> dict[str, tuple[int, int]]:
        spans, at = {}, len(self.header)
        for entry in self._ordered:
            spans[entry.key] = (at, entry.nbytes)
            at += entry.nbytes
        return spans

    def span(self, key: str) -> tuple[int, int]:
        """(offset in the file, length), bytes."""
        return self._spans[key]

    def row_bytes(self, key: str) -> int:
        """Bytes of one element of the tensor's first dimension."""
        shape = next(entry.shape for entry in self.entries if entry.key == key)
        return self.span(key)[1] // shape[0] if shape and shape[0] else 0

    @property
    def file_bytes(self) -> int:
        return len(self.header) + sum(entry.nbytes for entry in self.entries)
