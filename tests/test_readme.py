"""What the README says exists, exists: make targets, commands, options, files, and the Python example runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from fate.cli.app import build_app
from fate.systems import system_names
from tiny import tiny_store

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(build_app()).commands


def _options(command: str, rest: list[str]) -> set[str]:
    """Of a command, or of the one in a group that `rest` begins with."""
    found = COMMANDS[command]
    found = getattr(found, "commands", {}).get(rest[0] if rest else "", found)
    return {option for parameter in found.params for option in parameter.opts} | {"--help"}


def _fate_commands(text: str) -> list[str]:
    """`fate ...` as written in backticks, in code blocks and in recipes."""
    return re.findall(r"(?:^|[`/])fate ((?:[a-z]+)(?: [^`\n|]*)?)", text, re.M)


def test_make_targets() -> None:
    named = set(re.findall(r"^make (\w+)", README, re.M))
    assert {"demo", "test"} <= named
    assert named <= set(re.findall(r"^(\w+):", MAKEFILE, re.M))


@pytest.mark.parametrize("line", sorted({*_fate_commands(README), *_fate_commands(MAKEFILE)}))
def test_commands_and_their_options(line: str) -> None:
    command, *rest = shlex.split(line)
    assert command in COMMANDS
    assert {word for word in rest if word.startswith("-")} <= _options(command, rest)


def test_every_command_is_documented() -> None:
    written = {line.split()[0] for line in _fate_commands(README)}
    assert set(COMMANDS) - written <= {"bench"}


def test_systems() -> None:
    paragraph = README[README.index("Systems (`--system`)") :].split("\n\n")[0]
    named = set(re.findall(r"`([a-z][a-z0-9-]+)`", paragraph))
    assert named == set(system_names())


def test_links_and_files() -> None:
    links = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert links
    for target in [*links, "assets/mini-moe"]:
        assert (ROOT / target).exists(), target


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert code.count("Qwen/Qwen1.5-MoE-A2.7B-Chat") == 2
    names: dict[str, object] = {}
    exec(code.replace("Qwen/Qwen1.5-MoE-A2.7B-Chat", str(tiny_store("qwen2_moe"))), names)
    names["model"].fate.close()
    printed = capsys.readouterr().out
    assert printed.startswith("Once upon a time")
    assert "StepStats(" in printed.splitlines()[-1]
