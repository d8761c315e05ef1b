"""What a store will hold, decided before its first byte: files, offsets, sizes and config.json.

>>> plan = plan_store(header, 8, tensors, {"model.embed_tokens": "embedding"}, {}, config, {})
>>> plan.total_bytes
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fate.store.format import MatrixSpec, RecordLayout, StoreHeader
from fate.store.reader import DENSE_FILE, EXPERTS_FILE, PACKED_FILE
from fate.store.tensorfile import TensorEntry, TensorFileLayout


@dataclass(frozen=True)
class StorePlan:
    """Everything known of a store before its first byte.

    tensor_files: file name -> layout. packed: key -> layout of each matrix in the packed file. small_files: file name
    -> content, written as it is.
    """

    header: StoreHeader
    tensor_files: dict[str, TensorFileLayout]
    packed: dict[str, RecordLayout]
    small_files: dict[str, bytes]

    @property
    def file_sizes(self) -> dict[str, int]:
        tensor_files = {name: layout.file_bytes for name, layout in self.tensor_files.items()}
        return {EXPERTS_FILE: self.header.file_bytes, **tensor_files}

    @property
    def total_bytes(self) -> int:
        return sum(self.file_sizes.values())

    @property
    def num_items(self) -> int:
        return self.header.num_records + sum(len(layout.entries) for layout in self.tensor_files.values())

    @property
    def item_bytes(self) -> int:
        """Bytes of all records and tensors."""
        records = sum(s.num_experts * self.header.layout(i).record_bytes for i, s in enumerate(self.header.layers))
        return records + sum(entry.nbytes for layout in self.tensor_files.values() for entry in layout.entries)


def plan_store(
    header: StoreHeader,
    dense_bits: int,
    tensors: list[TensorEntry],
    kinds: Mapping[str, str],
    ties: Mapping[str, str],
    config: Mapping[str, Any],
    small_files: Mapping[str, bytes],
) -> StorePlan:
    """The plan of a store. tensors: every parameter and persistent buffer but the stacked experts'.

    kinds: module name -> "linear" or "embedding" of the modules whose weight is packed at `dense_bits` (empty for 16).
    ties: module name -> packed module whose matrix it shares. config: config.json without `quantization_config`.
    """
    shapes = {entry.key: entry.shape for entry in tensors}
    packed = {f"{name}.weight": packed_layout(f"int{dense_bits}", *shapes[f"{name}.weight"]) for name in kinds}
    metadata = {"format": "pt", "fingerprint": header.fingerprint}
    dense = tuple(entry for entry in tensors if entry.key not in packed)
    tensor_files = {DENSE_FILE: TensorFileLayout(dense, metadata)}
    if packed:
        entries = tuple(TensorEntry(key, torch.uint8, (layout.record_bytes,)) for key, layout in packed.items())
        tensor_files[PACKED_FILE] = TensorFileLayout(entries, metadata)
    quantization = {
        "quant_method": "fate",
        "format_version": header.version,
        "codec": header.codec,
        "dense_bits": dense_bits,
        "fingerprint": header.fingerprint,
        "packed": {name: _packed_entry(kind, packed[f"{name}.weight"]) for name, kind in kinds.items()},
        "tied": dict(ties),
    }
    content = json.dumps({**config, "quantization_config": quantization}, indent=2).encode() + b"\n"
    return StorePlan(header, tensor_files, packed, {**small_files, "config.json": content})


def packed_layout(codec: str, rows: int, cols: int) -> RecordLayout:
    """How a packed dense matrix [rows, cols] is stored."""
    return RecordLayout(codec, (MatrixSpec("weight", rows, cols),), page_aligned=False)


def _packed_entry(kind: str, layout: RecordLayout) -> dict[str, Any]:
    matrix = layout.matrices[0]
    return {"kind": kind, "rows": matrix.rows, "cols": matrix.cols, "codec": layout.codec}
