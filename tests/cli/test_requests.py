"""Arguments that cannot be carried out: one line that names the value and the fix, exit code 2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cli_support import FAMILY, Cli, Refuse, copied
from tiny import tiny_checkpoint, tiny_store


@pytest.mark.parametrize("memory", ["0", "-1", "lots", "4XB", "", "nan", "-2GiB"])
def test_a_memory_size_that_is_none(refuse: Refuse, memory: str) -> None:
    line = refuse(2, "run", tiny_checkpoint(FAMILY), "prompt", f"--memory={memory}")
    assert f"memory size {memory!r} is not valid: write a positive size such as 6GiB" in line


@pytest.mark.parametrize("experts", ["0", "-1", "0%", "lots", "nan%", "%"])
def test_a_share_of_experts_that_is_none(refuse: Refuse, experts: str) -> None:
    line = refuse(2, "run", tiny_checkpoint(FAMILY), "prompt", f"--experts={experts}")
    assert f"experts {experts!r} is not valid: write a share such as 25%" in line


def test_a_budget_below_the_dense_part_names_one_that_works(refuse: Refuse, cli: Cli) -> None:
    line = refuse(2, "run", tiny_store(FAMILY), "prompt", "--memory", "20MiB")
    assert "a budget of 20.00 MiB is too small" in line
    smallest = re.search(r"the smallest that works is (\d+MiB)", line)[1]
    assert cli("run", tiny_store(FAMILY), "prompt", "--memory", smallest, "--max-new-tokens", 2).code == 0


@pytest.mark.parametrize(
    "argv, words",
    [
        ([""], r"the prompt is empty: give at least one token"),
        (["a\udcffb"], r"the prompt is not UTF-8 text: write it in UTF-8"),
        (["a" * 600], r"728 tokens of prompt and generation are beyond the plan's context of 512: .*--max-context 728"),
        (["abc", "--max-context", 5], r"131 tokens .* context of 5: shorten them or .*--max-context 131"),
        (["abc", "--system", "fast"], r"unknown system 'fast': choose one of cross-layer, .*exact, .*load-on-demand"),
        (["abc", "--temperature", "nan"], r"temperature nan is not valid: give 0"),
        (["abc", "--temperature", "-1"], r"temperature -1\.0 is not valid: give 0"),
        (["abc", "--top-p", 0], r"top-p 0\.0 is not valid: give a number above 0"),
        (["abc", "--repetition-penalty", 0], r"repetition penalty 0\.0 is not valid: give a positive number"),
    ],
)
def test_a_run_that_cannot_be(refuse: Refuse, argv: list[object], words: str) -> None:
    line = refuse(2, "run", tiny_store(FAMILY), *argv)
    assert re.search(words, line), line


def test_chat_needs_a_template(refuse: Refuse, tmp_path: Path) -> None:
    store = copied(tiny_store(FAMILY), tmp_path / "store")
    (store / "chat_template.jinja").unlink()
    assert "no chat template: leave out --chat" in refuse(2, "run", store, "Hi", "--chat", stores=1)


@pytest.mark.parametrize(
    "argv",
    [
        ["rum"],
        ["run"],
        ["run", "model"],
        ["run", "model", "prompt", "--memroy", "6GiB"],
        ["run", "model", "prompt", "--max-new-tokens", "0"],
        ["run", "model", "prompt", "--max-new-tokens", "many"],
        ["run", "model", "prompt", "--max-context", "0"],
        ["run", "model", "prompt", "--seed", "9" * 30],
        ["inspect", "model", "--max-context", "-5"],
        ["inspect", "model", "--text", "file", "--max-tokens", "0"],
        ["chat"],
        ["chat", "model", "prompt"],
        ["eval", "model", "--text", "file", "--max-context", "1"],
        ["bench", "text", "model"],
        ["bench", "systems", "model"],
        ["bench", "model"],
        ["synth", "qwen1.5-moe-a2.7b"],
        ["synth", "qwen1.5-moe-a2.7b", "out", "--num-layers", "0"],
        ["--nope"],
    ],
)
def test_a_command_line_that_is_none(cli: Cli, argv: list[str]) -> None:
    result = cli(*argv)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Usage: fate ")
    assert "Traceback" not in result.err
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("command", ["eval", "bench text", "inspect"])
@pytest.mark.parametrize(
    "content, words",
    [
        (b"\xff\xfe\x00\x80", "is not UTF-8 text: give a text file"),
        (b" \n", "has no text: give a text file with some"),
        (None, "cannot be read (No such file or directory): give a text file"),
        ("directory", "cannot be read (Is a directory): give a text file"),
    ],
)
def test_a_text_that_is_none(
    refuse: Refuse, tmp_path: Path, command: str, content: bytes | str | None, words: str
) -> None:
    file = tmp_path / "text.txt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        file.mkdir()
    line = refuse(2, *command.split(), tiny_store(FAMILY), "--text", file)
    assert f"{file} {words}" in line


def test_a_text_too_short(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abc")
    line = refuse(2, "bench", "text", tiny_store(FAMILY), "--text", tmp_path / "text.txt")
    assert "the text has 3 tokens, 128 are needed: give a longer text" in line


@pytest.mark.parametrize(
    "argv, words",
    [
        (["bench", "text", tiny_store, "--text", "text", "--systems", ","], "no system was named: give --systems"),
        (["bench", "text", tiny_store, "--text", "text", "--systems", "exact,x"], "unknown system 'x': choose one of"),
        (["inspect", tiny_store, "--max-tokens", "5"], "--max-tokens is of a text: give --text too"),
        (["convert", tiny_checkpoint, "out", "--expert-bits", "3"], r"expert_bits=3.*\(4, 16, 32\)"),
        (["convert", tiny_checkpoint, "out", "--dense-bits", "5"], r"dense_bits=5.*\(4, 8, 16\)"),
        (["convert", tiny_store, "out"], "it is a store already"),
        (["synth", "gpt", "out"], "unknown synthetic model 'gpt': choose one of"),
        (["synth", "qwen1.5-moe-a2.7b", "out", "--routing", "x"], "unknown routing 'x': choose one of real, uniform"),
        (["synth", "qwen1.5-moe-a2.7b", "out", "--dense-bits", "5"], r"dense_bits=5: choose from \(4, 8, 16\)"),
        (["doctor", "--path", "nowhere"], "nowhere is not a directory: give one on the disk to measure"),
    ],
)
def test_an_option_that_is_none(refuse: Refuse, argv: list[Any], words: str) -> None:
    Path("text").write_text("abc" * 100)
    line = refuse(2, *(part(FAMILY) if callable(part) else part for part in argv))
    assert re.search(words, line), line
