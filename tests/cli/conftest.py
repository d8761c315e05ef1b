"""`fate` run in this process, in an empty directory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cli_support import Cli, Refuse, Result
from fate.cli.app import main
from fate.store.reader import is_store


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Runs `fate` with the given arguments in an empty directory, with a cache of its own."""
    monkeypatch.setenv("FATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def run(*argv: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return Result(code=exit_info.value.code, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def refuse(cli: Cli, tmp_path: Path) -> Refuse:
    """Runs `fate`, expects a refusal and returns its one line."""

    def run(code: int, *argv: object, stores: int = 0) -> str:
        result = cli(*argv)
        assert result.code == code, result.err
        assert re.fullmatch(r"error: \S[^\n]*\n", result.err), result.err
        assert "Traceback" not in result.err
        assert len([path for path in tmp_path.rglob("*") if is_store(path) and path.suffix != ".partial"]) == stores
        return result.err

    return run
