"""Existing output, full disks, missing permissions: one line, and nothing that looks whole is left."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli_support import FAMILY, Cli, Refuse, copied
from fate.cli.app import main
from fate.store.reader import EXPERTS_FILE
from fate.tools.synth import store as synth_module
from tiny import FAMILIES, tiny_checkpoint, tiny_store


def test_an_existing_out_is_kept_unless_forced(refuse: Refuse, cli: Cli) -> None:
    out = copied(tiny_store("mixtral"), Path("out.fate").absolute())
    before = (out / EXPERTS_FILE).read_bytes()
    line = refuse(2, "convert", tiny_checkpoint(FAMILY), out, stores=1)
    assert f"{out} exists already: choose another OUT or pass --force" in line
    assert (out / EXPERTS_FILE).read_bytes() == before
    assert cli("convert", tiny_checkpoint(FAMILY), out, "--force").code == 0
    assert (out / EXPERTS_FILE).read_bytes() != before
    assert [path.name for path in Path.cwd().iterdir()] == ["out.fate"]


def test_force_does_not_replace_what_is_no_store(refuse: Refuse) -> None:
    source = copied(tiny_checkpoint(FAMILY), Path("model").absolute())
    files = sorted(source.iterdir())
    line = refuse(2, "convert", source, source, "--force")
    assert "exists and is not a store, so it is not replaced: choose another OUT" in line
    assert sorted(source.iterdir()) == files


@pytest.mark.parametrize("command", ["convert", "synth", "run"])
def test_a_full_disk(refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    tiny = {**FAMILIES[FAMILY], "model_type": FAMILY, "vocab_size": 9600}
    monkeypatch.setitem(synth_module.MODELS, "deepseek-moe-16b", tiny)
    real, calls = os.pwrite, []

    def full(file: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    argv = {
        "convert": [tiny_checkpoint(FAMILY), "out.fate"],
        "synth": ["deepseek-moe-16b", "out.fate"],
        "run": [tiny_checkpoint(FAMILY), "prompt"],
    }
    line = refuse(1, command, *argv[command])
    assert re.search(r"the disk is full: .* were to be written to .*; free some space and run the same command", line)
    (partial,) = (path.parent for path in tmp_path.rglob(EXPERTS_FILE))
    assert partial.suffix == ".partial"
    assert "is not a Fate store" in refuse(1, "inspect", partial)


def test_a_disk_known_to_be_too_small(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    line = refuse(1, "convert", tiny_checkpoint(FAMILY), "out.fate")
    assert re.search(r"out\.fate needs .* has 1000 B free: free some space or choose another OUT", line)
    assert not list(Path.cwd().iterdir())


def test_an_out_that_cannot_be_written(refuse: Refuse) -> None:
    Path("file").write_text("")
    line = refuse(1, "convert", tiny_checkpoint(FAMILY), "file/out.fate")
    assert re.search(r"file\S*: Not a directory: check the path", line), line


def test_permission_denied(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: object, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "mkdir", denied)
    line = refuse(1, "convert", tiny_checkpoint(FAMILY), "out.fate")
    assert "out.fate.partial: Permission denied: check its permissions or choose another path" in line


def test_a_disk_that_fills_where_no_one_looks(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    assert refuse(1, "doctor") == "error: No space left on device: free some space\n"


def test_a_bug_is_not_dressed_up_as_bad_luck(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise AssertionError("planted")

    monkeypatch.setattr("fate.tools.diagnosis.diagnose", broken)
    with pytest.raises(AssertionError, match="planted"):
        main(["doctor"])
