"""The writer: journalled, aligned, checksummed, and never a whole-looking store that is not whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from fate.core import ExpertKey
from fate.errors import FateError, OutputExistsError, UsageError
from fate.store.format import PAGE_BYTES, LayerSpec, MatrixSpec, StoreHeader
from fate.store.plan import StorePlan
from fate.store.reader import CHECKSUMS_FILE, DENSE_FILE, EXPERTS_FILE, StoreReader
from fate.store.tensorfile import TensorEntry, TensorFileLayout
from fate.store.writer import StoreWriter

_ENTRIES = (
    TensorEntry("odd", torch.uint8, (3,)),
    TensorEntry("scalar", torch.int64, ()),
    TensorEntry("matrix", torch.float32, (5, 7)),
    TensorEntry("empty", torch.float32, (0, 4)),
    TensorEntry("half", torch.bfloat16, (9,)),
    TensorEntry("flag", torch.bool, (2,)),
)


def _plan(fingerprint: str = "abc") -> StorePlan:
    matrices = (MatrixSpec("gate_up_proj", 12, 64), MatrixSpec("down_proj", 64, 6))
    layers = (
        LayerSpec("model.layers.0.mlp.experts", 3, matrices),
        LayerSpec("model.layers.1.mlp.experts", 2, matrices),
    )
    header = StoreHeader("fp32", fingerprint, "qwen2_moe", layers)
    config = {"quantization_config": {"quant_method": "fate", "fingerprint": fingerprint}}
    dense = TensorFileLayout(_ENTRIES, {"format": "pt", "fingerprint": fingerprint})
    return StorePlan(header, {DENSE_FILE: dense}, {}, {"config.json": json.dumps(config).encode()})


def _record(plan: StorePlan, layer: int, expert: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * layer + expert)
    size = plan.header.layout(layer).record_bytes
    return torch.randint(256, (size,), dtype=torch.uint8, generator=generator)


def _values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {entry.key: torch.randint(2, entry.shape, generator=generator).to(entry.dtype) for entry in _ENTRIES}


def _fill(writer: StoreWriter, skip: int = 0) -> int:
    """Write what is missing but the last `skip` items; returns how many were written."""
    plan, written = writer.plan, 0
    work = [
        (lambda key=key: writer.has_record(*key), lambda key=key: writer.write_record(*key, _record(plan, *key)))
        for key in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    ]
    for name, value in _values().items():
        parts = [(0, value)]
        if name == "matrix":
            parts = [(2 * 28, value[2:]), (0, value[:2])]
        work.append(
            (
                lambda name=name: writer.has_tensor(DENSE_FILE, name),
                lambda name=name, parts=parts: writer.write_tensor(DENSE_FILE, name, parts),
            )
        )
    for is_done, write in work[: len(work) - skip]:
        if not is_done():
            write()
            written += 1
    return written


def _store(out: Path) -> Path:
    with StoreWriter(out, _plan()) as writer:
        _fill(writer)
        return writer.finalize()


@pytest.mark.parametrize("suffix", ["partial", "replaced"])
def test_directories_of_others_are_left_alone(tmp_path: Path, suffix: str) -> None:
    other = tmp_path / f"out.{suffix}"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    with pytest.raises(UsageError, match="not of our making"):
        StoreWriter(tmp_path / "out", _plan())
    assert (other / "thesis.tex").read_text() == "years"


def test_records_and_checksums_are_where_the_header_says(tmp_path: Path) -> None:
    out, plan = _store(tmp_path / "out"), _plan()
    content = (out / EXPERTS_FILE).read_bytes()
    assert len(content) == plan.header.file_bytes
    for layer, expert in [(0, 0), (0, 2), (1, 1)]:
        record = _record(plan, layer, expert).numpy().tobytes()
        start, split = plan.header.record_offset(layer, expert), plan.header.layout(layer).split
        assert content[start : start + len(record)] == record
        at = plan.header.checksums_offset + 16 * plan.header.record_index(layer, expert)
        assert content[at : at + 8] == xxhash.xxh64_intdigest(record[:split]).to_bytes(8, "little")
        assert content[at + 8 : at + 16] == xxhash.xxh64_intdigest(record[split:]).to_bytes(8, "little")
    assert sorted(path.name for path in out.iterdir()) == [CHECKSUMS_FILE, "config.json", DENSE_FILE, EXPERTS_FILE]


def test_the_reader_reads_what_was_written(tmp_path: Path) -> None:
    out, plan = _store(tmp_path / "out"), _plan()
    reader = StoreReader(out)
    try:
        assert reader.header == plan.header
        # Page-aligned memory, as O_DIRECT asks for.
        size = plan.header.layout(1).record_bytes
        memory = torch.empty(size + PAGE_BYTES, dtype=torch.uint8)
        shift = -memory.data_ptr() % PAGE_BYTES
        buffer = memory[shift : shift + size]
        reader.read_into(ExpertKey(1, 0), buffer.numpy().data, 0)
        reader.verify(ExpertKey(1, 0), buffer.numpy().data, prefix=True, rest=True)
        assert torch.equal(buffer, _record(plan, 1, 0))
    finally:
        reader.close()


def test_dense_file_is_valid_for_the_safetensors_library(tmp_path: Path) -> None:
    file = _store(tmp_path / "out") / DENSE_FILE
    loaded = load_file(file)
    assert set(loaded) == set(_values())
    for name, value in _values().items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value), name
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "fingerprint": "abc"}
    layout = _plan().tensor_files[DENSE_FILE]
    assert len(layout.header) % PAGE_BYTES == 0
    assert all(layout.span(entry.key)[0] % entry.dtype.itemsize == 0 for entry in _ENTRIES)


def test_header_page_comes_last(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "out", _plan()) as writer:
        _fill(writer)
    partial = tmp_path / "out.partial"
    assert (partial / EXPERTS_FILE).read_bytes()[:PAGE_BYTES] == bytes(PAGE_BYTES)
    assert not (partial / "config.json").exists()
    with pytest.raises(FateError):
        StoreReader(partial)


def test_a_resumed_writer_makes_only_what_is_missing(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "out", _plan()) as writer:
        assert _fill(writer, skip=4) == 7
    with StoreWriter(tmp_path / "out", _plan()) as writer:
        assert _fill(writer) == 4
        resumed = writer.finalize()
    whole = _store(tmp_path / "whole")
    for path in whole.iterdir():
        assert (resumed / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_journal_line_cut_short_is_made_again(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "out", _plan()) as writer:
        _fill(writer, skip=4)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    os.truncate(journal, journal.stat().st_size - 4)
    with StoreWriter(tmp_path / "out", _plan()) as writer:
        assert _fill(writer) == 5
        writer.finalize()
    whole = _store(tmp_path / "whole")
    assert (tmp_path / "out" / EXPERTS_FILE).read_bytes() == (whole / EXPERTS_FILE).read_bytes()


def test_nothing_is_journalled_before_its_data_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "out.partial" / "journal.jsonl"
    lines_at_sync: list[int] = []
    real = os.fdatasync

    def watching(file: int) -> None:
        real(file)
        lines_at_sync.append(journal.read_text().count("\n"))

    monkeypatch.setattr("fate.store.writer.SYNC_BYTES", 1)
    with StoreWriter(tmp_path / "out", _plan()) as writer:
        monkeypatch.setattr(os, "fdatasync", watching)
        writer.write_record(0, 0, _record(writer.plan, 0, 0))
        writer.write_record(0, 1, _record(writer.plan, 0, 1))
    files = 2
    assert lines_at_sync == [1] * files + [2] * files
    assert journal.read_text().count("\n") == 3


def test_a_partial_of_another_source_is_discarded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with StoreWriter(tmp_path / "out", _plan("other")) as writer:
        _fill(writer)
    with StoreWriter(tmp_path / "out", _plan()) as writer:
        assert "starting again" in caplog.text
        assert _fill(writer) == 11


def test_a_whole_partial_that_was_not_renamed_is_only_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", crash)
    with StoreWriter(tmp_path / "out", _plan()) as writer:
        _fill(writer)
        with pytest.raises(KeyboardInterrupt):
            writer.finalize()
    monkeypatch.undo()
    with StoreWriter(tmp_path / "out", _plan()) as writer:
        assert _fill(writer) == 0
        writer.finalize()
    assert StoreReader(tmp_path / "out").header == _plan().header


def test_an_existing_output_needs_force(tmp_path: Path) -> None:
    _store(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="--force"):
        StoreWriter(tmp_path / "out", _plan("new"))
    with StoreWriter(tmp_path / "out", _plan("new"), force=True) as writer:
        _fill(writer)
        assert StoreReader(tmp_path / "out").header.fingerprint == "abc"
        writer.finalize()
    assert StoreReader(tmp_path / "out").header.fingerprint == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_writers_of_one_store_are_refused(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "out", _plan()), pytest.raises(UsageError, match="another process"):
        StoreWriter(tmp_path / "out", _plan())


def test_a_gap_in_the_middle_cannot_be_finalized(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "out", _plan()) as writer:
        _fill(writer, skip=1)
        with pytest.raises(AssertionError):
            writer.finalize()
    assert not (tmp_path / "out").exists()
