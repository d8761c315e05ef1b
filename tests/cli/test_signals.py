"""Ctrl-C and closed pipes, in forks of one process that has imported fate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fate
from cli_support import FAMILY
from fate.store.reader import EXPERTS_FILE
from tiny import tiny_store

MINI = Path(__file__).resolve().parents[2] / "assets" / "mini-moe"

# One process imports fate, which takes seconds, and forks for every job: a line in, "pid" and then "exit code" out.
FORKS = """
import json, os, signal, sys
import fate.cli.conversation, fate.convert.conversion
from fate.cli.app import main

for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        unread, closed = os.pipe()
        os.close(unread)
        for target, name in ((1, job["out"]), (2, job["err"])):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600) if name else closed, target)
        main(job["argv"])
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    """`start` returns the pid of `fate ARGV...` with its output in files; `wait` its exit code."""

    def __init__(self) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        paths = [str(Path(fate.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self._server = subprocess.Popen([sys.executable, "-c", FORKS], env=environment, **pipes)

    def start(self, *argv: object, out: Path | None, err: Path) -> int:
        job = {"argv": [str(argument) for argument in argv], "out": str(out or ""), "err": str(err)}
        print(json.dumps(job), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def wait(self) -> int:
        return int(self._server.stdout.readline())

    def close(self) -> None:
        self._server.kill()
        self._server.wait(timeout=10)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_closed_pipe_ends_a_run_quietly(forks: Forks, tmp_path: Path) -> None:
    forks.start("run", tiny_store(FAMILY), "Once", "-q", out=None, err=tmp_path / "err")
    assert forks.wait() == 1
    assert (tmp_path / "err").read_text() == ""


def test_ctrl_c_stops_a_run_within_a_second(forks: Forks, tmp_path: Path) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    sampling = ("--temperature", 1, "--seed", 3, "--max-new-tokens", 500)
    pid = forks.start("run", tiny_store(FAMILY, eos_token_id=None), "Once", *sampling, out=out, err=err)
    wait_until(lambda: out.exists() and out.stat().st_size > 0)
    start = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert forks.wait() == 130
    assert time.monotonic() - start < 1
    assert out.read_text(errors="replace").endswith("\n"), "the shell's prompt gets a line of its own"
    assert "\ntotal " in err.read_text()
    assert "Traceback" not in err.read_text()
    assert "TTFT" not in err.read_text(), "no summary of what was not finished"


def test_ctrl_c_leaves_a_conversion_to_go_on_with(forks: Forks, tmp_path: Path) -> None:
    store, err = tmp_path / "mini.fate", tmp_path / "err"
    partial = tmp_path / "mini.fate.partial"
    pid = forks.start("convert", MINI, store, out=tmp_path / "out", err=err)
    wait_until((partial / EXPERTS_FILE).exists)
    time.sleep(0.2)
    start = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert forks.wait() == 130
    assert time.monotonic() - start < 3  # a matrix is finished first; two busy cores took 1.2
    assert err.read_text() == "stopped: the same command goes on from here\n"
    assert not store.exists()
    assert len((partial / "journal.jsonl").read_text().splitlines()) > 1
