"""Reading checkpoints: the library's bytes, bounded memory, and damage named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file

from fate.convert.checkpoint import Checkpoint, resolve_source
from fate.errors import CheckpointError, ModelNotFoundError
from tiny import tiny_checkpoint

_TENSORS = {
    "matrix": torch.arange(60, dtype=torch.float32).view(12, 5),
    "stacked": torch.arange(24).view(4, 3, 2).to(torch.bfloat16),
    "scalar": torch.tensor(7),
    "fp8": torch.arange(8).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(_TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_tensors_are_those_of_the_library(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        assert set(checkpoint.keys()) == set(_TENSORS)
        for key, value in _TENSORS.items():
            assert (checkpoint.shape(key), checkpoint.dtype(key)) == (tuple(value.shape), value.dtype)
            assert torch.equal(checkpoint.read(key).double(), value.double()), key
            assert checkpoint.meta(key).shape == value.shape
        assert torch.equal(checkpoint.read_rows("matrix", 3, 7), _TENSORS["matrix"][3:7])
        assert torch.equal(checkpoint.read_rows("stacked", 3, 4), _TENSORS["stacked"][3:4])


def test_shards_are_read_through_the_index() -> None:
    source = tiny_checkpoint("qwen2_moe")
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    with Checkpoint(source) as checkpoint:
        assert set(checkpoint.keys()) == set(index)


def test_fingerprint_tells_checkpoints_apart(tmp_path: Path) -> None:
    prints = []
    for name, change in [("same", 0.0), ("again", 0.0), ("other", 1.0)]:
        (tmp_path / name).mkdir()
        save_file({"matrix": torch.full((64, 64), change)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / name / "model.safetensors", ns=(0, 0))
        prints.append(Checkpoint(tmp_path / name).fingerprint())
    (tmp_path / "again" / "config.json").write_text('{"a": 1}')
    assert prints[0] == prints[1]
    os.utime(tmp_path / "same" / "model.safetensors", ns=(0, 1))
    rewritten = Checkpoint(tmp_path / "same").fingerprint()
    assert len({prints[0], prints[2], rewritten, Checkpoint(tmp_path / "again").fingerprint()}) == 4


def _high_water_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is reset and read through /proc")
def test_resident_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    save_file(
        {str(index): torch.zeros(2048, 1024) for index in range(16)}, tmp_path / "model.safetensors"
    )  # 8 MiB each
    (tmp_path / "config.json").write_text("{}")
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water_bytes()
    with Checkpoint(tmp_path) as checkpoint:
        for key in checkpoint.keys():  # noqa: SIM118 - not a mapping
            checkpoint.read(key)
    assert _high_water_bytes() - before < 24 * 1024**2


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": "1"},
        [],
    ],
)
def test_hostile_headers_are_refused(entry: object, folder: Path) -> None:
    header = json.dumps({"x": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="corrupt header"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        ((1000).to_bytes(8, "little") + b"{}", "cut short within its header"),
        ((2).to_bytes(8, "little") + b"[]", "corrupt header"),
    ],
)
def test_files_that_are_no_safetensors_are_refused(content: bytes, message: str, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_a_broken_index_and_config_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="no weights"):
        Checkpoint(folder)
    index = folder / "model.safetensors.index.json"
    for content in ["{", "{}", '{"weight_map": 3}']:
        index.write_text(content)
        with pytest.raises(CheckpointError, match="not a safetensors index"):
            Checkpoint(folder)
    save_file({"a": torch.ones(1)}, folder / "part.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors", "b": "part.safetensors"}}))
    with pytest.raises(CheckpointError, match="lacks b which"):
        Checkpoint(folder)
    (folder / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "kind, message",
    [
        (RepositoryNotFoundError, "neither a directory nor a model"),
        (GatedRepoError, "gated"),
        (LocalEntryNotFoundError, "could not be downloaded"),
    ],
)
def test_hub_failures_are_one_line(kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise kind.__new__(kind)  # its constructor wants a response of the hub client's own transport

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        resolve_source("some/model")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_a_hub_id_is_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("looked up"))
    (tmp_path / "file").touch()
    for name in ["/no/such/folder", "./relative", "a/b/c", str(tmp_path / "file"), ""]:
        with pytest.raises(ModelNotFoundError, match="not a directory"):
            resolve_source(name)
    assert resolve_source(tmp_path) == tmp_path
