"""`python -m benchmarks.peers`: what it prints, writes and refuses, with workers of the tests' own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.command import main
from cli_support import FAMILY
from tiny import tiny_store

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_main(*argv: object) -> int | str | None:
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in argv])
    return exit_info.value.code


def test_a_table_and_a_line_of_json(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], job: dict[str, Any], limit: int | None) -> dict[str, Any]:
        if job.get("repack"):
            return {"failed": "it fell over"}
        speed = 1.0 if "repack" in job else 3.0
        speeds = {str(threads): speed for threads in job["threads"]}
        return {"launch_s": 1 / speed, "prefill": {str(t): speeds for t in job["prefills"]}, "decode": speeds}

    monkeypatch.setattr("benchmarks.peers.comparison.run_worker", run)
    monkeypatch.setattr("benchmarks.peers.comparison.peer_version", lambda python: "1.2.3")
    monkeypatch.setattr("fate.tools.diagnosis.memory_read_gb_per_s", lambda: 20.0)
    wide = {"hidden_size": 128, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128}
    store = tiny_store(FAMILY, dense_bits=4, num_hidden_layers=2, **wide)
    made = folder / "made" / "for it"
    code = run_main(store, "--budgets", "resident,1GiB", "--files", made, "--threads", 2, "--json", "-")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert re.search(r"^1GiB +decode +tokens/s +3\.00 .* 1\.00 .* +3\.00$", printed.out, re.M)
    assert "q4_0 repacked at resident: it fell over" in printed.out
    assert json.loads(printed.out.splitlines()[-1])["rows"][0]["ratio"] == 3.0
    assert {path.name for path in made.glob("*.gguf")} == {f"{store.stem}.q4_1.gguf", f"{store.stem}.q4_0.gguf"}


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--budgets", "4GiB,many"], "memory size 'many' is not valid"),
        (["--budgets", ","], "no budget was named"),
        (["--forms", "q4_0,q5"], "unknown GGUF form 'q5'"),
        (["--threads", "two"], "threads 'two' is not valid"),
        (["--peer-python", sys.executable], "has no llama-cpp-python: python -m venv peer"),
        (["--peer-python", "/no/python"], "/no/python cannot be run"),
    ],
)
def test_peers_that_cannot_be_compared(
    argv: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(tiny_store(FAMILY), *argv) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(r"error: \S[^\n]*\n", line), line
    assert words in line


def test_it_is_run_from_the_root() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Example: python -m benchmarks.peers" in " ".join(done.stdout.split())
