"""A machine without the compiled extension: it says so, and torch does the work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cli_support import FAMILY
from tiny import tiny_store

# None in sys.modules is how the import system marks a module that cannot be found.
COMMANDS = """
import sys
sys.modules["fate.kernels.cpu._cpu"] = None
from fate.tools import diagnosis
from fate.cli.app import main
diagnosis.disk_read_gb_per_s = lambda path: (True, 1.0)
for argv in (["doctor"], ["run", sys.argv[1], "Once", "--experts", "50%", "--max-new-tokens", "3"]):
    try:
        main(argv)
    except SystemExit as exit:
        assert exit.code == 0, (argv, exit.code)
"""
NOTICE = "the compiled kernels are missing (import of fate.kernels.cpu._cpu halted; None in sys.modules): "
ADVICE = "torch does their work, many times slower; reinstall fate-moe with a C++20 compiler at hand"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", COMMANDS, str(Path(tiny_store(FAMILY)).resolve())]
    cwd = tmp_path_factory.mktemp("cwd")
    return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, timeout=110)


def test_commands_run_without_it(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr
    assert " + 3 tokens " in result.stderr


def test_doctor_says_so(result: subprocess.CompletedProcess[str]) -> None:
    doctor = " ".join(result.stdout.split())
    assert f"kernels torch ({NOTICE}{ADVICE})" in doctor
    assert "instruction sets torch" in doctor


def test_loading_says_so_once(result: subprocess.CompletedProcess[str]) -> None:
    assert result.stderr.splitlines().count(NOTICE + ADVICE) == 1
