"""Help, usage errors and `import fate` wait for neither torch nor transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cli_support import FAMILY
from tiny import tiny_store

MINI = Path(__file__).resolve().parents[2] / "assets" / "mini-moe"
COMMANDS = [
    *([name] for name in ("run", "chat", "convert", "inspect", "eval", "profile", "doctor", "synth")),
    *(["bench", name] for name in ("text", "systems", "kernels")),
]
# Every job in a fork of a process that has imported nothing; what it imported is its exit code's business.
JOBS = """
import os, sys
import fate

def heavy():
    return sorted({"torch", "transformers"} & sys.modules.keys())

assert not heavy(), heavy()
from fate.cli.app import main
for line in sys.stdin:
    if (pid := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            main(line.rstrip("\\n").split("\\t"))
        except SystemExit as stop:
            code = stop.code or 0
        if heavy():
            print(line, heavy(), file=sys.stderr, flush=True)
        os._exit(100 if heavy() else code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def exit_codes(jobs: list[list[str]]) -> list[int]:
    """Of `fate ARGV...` for each; 100 where it imported torch or transformers."""
    lines = "".join("\t".join(argv) + "\n" for argv in jobs)
    done = subprocess.run([sys.executable, "-c", JOBS], input=lines, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return [int(code) for code in done.stdout.split()]


def test_help_imports_neither() -> None:
    assert exit_codes([["--help"], *([*command, "--help"] for command in COMMANDS)]) == [0] * (1 + len(COMMANDS))


def test_usage_errors_import_neither() -> None:
    wrong = [
        ["run"],
        ["walk"],
        ["run", str(MINI), ""],
        ["run", str(MINI), "Once", "--memory", "3 apples"],
        ["run", str(MINI), "Once", "--top-p", "2"],
        ["chat", str(MINI), "--system", "none-such"],
        ["chat", str(MINI), "--experts", "-1"],
    ]
    assert exit_codes(wrong) == [2] * len(wrong)


def test_a_heavy_import_would_be_seen() -> None:
    assert exit_codes([["doctor"]]) == [100]


FROM_PRETRAINED = """
import sys
import fate
import transformers

model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.fate).__name__, fate.convert.__name__, transformers.quantizers.auto.__loader__.__class__.__name__)
"""


def test_transformers_imported_later_knows_the_format() -> None:
    command = [sys.executable, "-c", FROM_PRETRAINED, str(tiny_store(FAMILY))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Session", "convert", "SourceFileLoader"]


def test_openmp_waits_as_the_user_says_or_as_suits_the_kernels() -> None:
    code = "import os, fate.cli.app as app; app.prepare_transformers(); print(os.environ['OMP_WAIT_POLICY'])"
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == [expected], done.stderr
