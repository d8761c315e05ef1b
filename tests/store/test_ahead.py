"""Dense weights read ahead: the same bytes, the same typed errors, and no thread left."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import fate
from cli_support import FAMILY, flip
from fate.errors import BudgetTooSmallError, ChecksumError, StoreError, UsageError
from fate.load import read_ahead
from fate.store import ahead
from fate.store.ahead import DenseWeights
from fate.store.files import PACKED_FILE
from fate.store.format import PAGE_BYTES
from tiny import tiny_store


@pytest.fixture
def store() -> Path:
    return tiny_store(FAMILY)


@pytest.fixture
def damaged(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "store"))


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "fate-dense-weights"]


def stored(store: Path) -> dict[str, bytes]:
    """What the safetensors library reads."""
    return {name: packed.numpy().tobytes() for name, packed in load_file(store / PACKED_FILE).items()}


@pytest.mark.parametrize("chunk", [PAGE_BYTES, 7 * PAGE_BYTES, 1 << 30])
def test_the_same_bytes_as_one_at_a_time(store: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "CHUNK_BYTES", chunk)
    with DenseWeights(store) as dense:
        read = {name: bytes(view) for name, view in dense.matrices()}
    assert read == stored(store)
    assert len(read) > 10


def test_views_outlive_the_reader(store: Path) -> None:
    with DenseWeights(store) as dense:
        views = dict(dense.matrices())
    assert {name: bytes(view) for name, view in views.items()} == stored(store)


def test_what_is_read_ahead_is_not_counted_twice(store: Path) -> None:
    with DenseWeights(store) as dense:
        assert dense.wait() == 0
        dense.start()
        assert dense.wait() >= sum(map(len, stored(store).values()))


def test_a_flipped_byte(damaged: Path) -> None:
    flip(damaged / PACKED_FILE, (damaged / PACKED_FILE).stat().st_size - 1)
    with pytest.raises(ChecksumError, match=r"weight is damaged .* convert the checkpoint again"):
        fate.load(damaged)
    assert not readers()


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_cut_short(damaged: Path, kept: float) -> None:
    file = damaged / PACKED_FILE
    os.truncate(file, int(file.stat().st_size * kept))
    with DenseWeights(damaged) as dense, pytest.raises(StoreError, match="convert the checkpoint again"):
        list(dense.matrices())
    with pytest.raises(StoreError, match=r"packed.safetensors cannot be read \("):
        fate.load(damaged)
    assert not readers()


def test_ctrl_c_meanwhile_joins_the_thread(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, real = threading.Event(), os.preadv

    def slow(*args: object) -> int:
        started.set()
        time.sleep(0.2)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ahead, "CHUNK_BYTES", PAGE_BYTES)
    monkeypatch.setattr(os, "preadv", slow)

    def interrupted() -> None:
        with read_ahead(store, None):
            assert started.wait(30)
            assert readers()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not readers()


def test_a_budget_that_may_not_hold_them_reads_nothing_ahead(store: Path) -> None:
    with read_ahead(store, "600MiB") as dense:
        assert dense is not None
        assert not readers()
        assert dense.wait() == 0
    with pytest.raises(BudgetTooSmallError):
        fate.load(store, memory="100MiB")


def test_weights_of_another_store_are_refused(store: Path, damaged: Path) -> None:
    with DenseWeights(damaged) as dense, pytest.raises(UsageError, match="dense holds the weights of"):
        fate.load(store, dense=dense)


def test_a_checkpoint_has_nothing_to_read_ahead(tmp_path: Path) -> None:
    with read_ahead(tmp_path, None) as dense:
        assert dense is None


@pytest.mark.parametrize("offsets", [[0, 4.5], ["0", "4"], [0, 4, 8], [8, 4], [-8, 4]])
def test_offsets_that_are_none(damaged: Path, offsets: list[object]) -> None:
    file = damaged / PACKED_FILE
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    table[next(name for name in table if name != "__metadata__")]["data_offsets"] = offsets
    file.write_bytes(content[:8] + json.dumps(table).encode().ljust(length)[:length] + content[8 + length :])
    with DenseWeights(damaged) as dense, pytest.raises(StoreError, match="header"):
        dict(dense.matrices())


def test_weights_that_were_let_go_say_so(store: Path) -> None:
    with DenseWeights(store) as dense:
        pass
    with pytest.raises(UsageError, match="read ahead again"):
        dict(dense.matrices())


def test_a_copy_in_another_process_reads_anew(store: Path) -> None:
    with DenseWeights(store) as dense:
        expected = {name: bytes(view) for name, view in dense.matrices()}
        copy = pickle.loads(pickle.dumps(dense))
    with copy:
        assert {name: bytes(view) for name, view in copy.matrices()} == expected
