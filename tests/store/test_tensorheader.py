"""Headers of safetensors files: those that the library writes, and hostile ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fate.store.tensorheader import TensorHeaderError, TensorSpan, read_tensor_header


def test_what_the_library_writes(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.uint8)}, file, {"format": "pt"})
    header = read_tensor_header(file)
    assert header.tensors == (TensorSpan("a", "F32", (2, 3), 0, 24), TensorSpan("b", "U8", (4,), 24, 28))
    assert header.data_start + header.data_bytes == file.stat().st_size


@pytest.mark.parametrize(
    "entry",
    [
        3,
        {},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]},
    ],
)
def test_hostile_entries(entry: object, tmp_path: Path) -> None:
    text, file = json.dumps({"x": entry}).encode(), tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(TensorHeaderError, match="has a corrupt header"):
        read_tensor_header(file)
