"""`fate bench text` and `fate bench systems`: what they print, write and refuse."""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cli_support import FAMILY, Cli, Refuse
from fate.bench.comparison import SYSTEMS, Comparison
from fate.bench.kernels import Limits
from fate.bench.systems import SystemsBench
from fate.kernels import native
from tiny import tiny_store

SMALL = ("--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 1)
QUICK = (*SMALL, "--record-prompts", 1, "--settle-tokens", 0, "--experts", "50%,80%")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox " * 20)
    return file


def systems(cli: Cli, text: Path, *more: object) -> Any:
    names = "load-on-demand-uncached,load-on-demand,cross-layer"
    return cli("bench", "systems", tiny_store(FAMILY), "--prompts", text, "--systems", names, *QUICK, *more)


def test_text(cli: Cli, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fate.tools.diagnosis.disk_read_gb_per_s", lambda path: (True, 2.5))
    argv = ("--systems", "load-on-demand,cross-layer", *SMALL, "--experts", 6, "--json")
    result = cli("bench", "text", tiny_store(FAMILY), "--text", text, *argv)
    assert result.code == 0, result.err
    assert result.out.splitlines()[0].split() == ["load-on-demand", "cross-layer"]
    assert max(len(line) for line in result.out.splitlines()[:-1]) <= 80
    assert result.json["disk_read_gb_per_s"] == 2.5
    assert result.json["systems"]["cross-layer"]["decode_tokens_per_s"] > 0


def test_kernels(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fate.bench.kernels.COLD_BYTES", 1 << 16)
    monkeypatch.setattr("fate.bench.kernels.LEAST_S", 1e-4)
    monkeypatch.setattr("fate.bench.kernels.machine_limits", lambda: Limits(2e9, 3e9))
    result = cli("bench", "kernels", tiny_store(FAMILY), "--tokens", "1,3", "--repeats", 1, "--json")
    assert result.code == 0, result.err
    assert re.search(
        r"^experts +8 x \[96, 64\], top 3 +INT2 +3 +[\d.]+ ms +[\d.]+ +\d+ +\d+% +[\d.]+%$", result.out, re.M
    )
    assert "reads 2.0 GB/s, int8 matrix product 3 GFLOP/s" in result.out
    assert result.json["shapes"][tiny_store(FAMILY).name]
    assert result.json["environment"]["kernels"] == native.available()[0]
    portable = cli("bench", "kernels", tiny_store(FAMILY), "--tokens", 1, "--repeats", 1, "--instructions", "portable")
    assert "GFLOP/s; kernels portable" in portable.out
    assert native.active().name == native.available()[0]


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "give either MODEL or --shapes"),
        (["store", "--shapes", "olmoe-1b-7b"], "give either MODEL or --shapes"),
        (["--shapes", "gpt-5"], "unknown shape 'gpt-5': choose one of "),
        (["--shapes", "olmoe-1b-7b", "--tokens", "1,0"], "tokens '1,0' is not valid"),
        (["--shapes", "olmoe-1b-7b", "--instructions", "mmx"], "unknown instruction set 'mmx': choose one of "),
    ],
)
def test_kernels_of_nothing(refuse: Refuse, argv: list[str], words: str) -> None:
    assert words in refuse(2, "bench", "kernels", *argv)


def test_systems(cli: Cli, text: Path, tmp_path: Path) -> None:
    result = systems(cli, text, "--link", "disk,1GB/s", "--json", tmp_path / "r.json", "--plots", tmp_path / "plots")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["complete"] is True
    assert [cell["link"] for cell in found["cells"]] == ["disk", "disk", "1GB/s", "1GB/s"]
    titles = re.findall(rf"^{tiny_store(FAMILY).name} over (.*): [\d.]+ GB/s, ρ [\d.]+$", result.out, re.M)
    assert titles == ["disk", "1GB/s"]
    assert len(re.findall(r"^(50%|80%) +(load-on-demand-uncached|load-on-demand|cross-layer) ", result.out, re.M)) == 24
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        *("speed.png", "hit-rate-disk.png", "hit-rate-1GB-s.png", "timeline-disk.png", "timeline-1GB-s.png")
    }
    again = systems(cli, text, "--link", "disk,1GB/s", "--resume", tmp_path / "r.json", "--plots", tmp_path / "plots")
    assert again.code == 0, again.err
    assert again.out == result.out, "all cells are there: nothing is measured again"
    assert json.loads((tmp_path / "r.json").read_text()) == found


def test_systems_end_with_one_line_of_json_where_asked(cli: Cli, text: Path) -> None:
    result = systems(cli, text, "--rho", "0.5", "--json", "-")
    assert result.code == 0, result.err
    assert [cell["link"] for cell in result.json["cells"]] == ["ρ 0.5", "ρ 0.5"], "rho alone leaves the disk out"


def test_ctrl_c_keeps_what_is_finished(cli: Cli, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, cells = SystemsBench.measure_cell, []

    def measure_cell(self: SystemsBench, *args: Any) -> Any:
        cells.append(args)
        if len(cells) == 2:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(SystemsBench, "measure_cell", measure_cell)
    result = systems(cli, text, "--json", tmp_path / "r.json")
    assert result.code == 130
    assert not [t for t in threading.enumerate() if t.name.startswith("fate-transfer")]
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["complete"], len(found["cells"])) == (False, 1)
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--systems", "fate9"], r"unknown system 'fate9': choose one of cross-layer, .*load-on-demand"),
        (["--systems", ","], r"nothing to compare: give at least one name to --systems"),
        (["--link", "0"], r"link speed '0' is not valid: write a positive number .* such as 12GB/s"),
        (["--link", "12GB"], r"link speed '12GB' is not valid"),
        (["--rho", "fast"], r"rho 'fast' is not valid: give positive numbers separated by commas"),
        (["--rho", "0"], r"rho 0\.0 is not valid: give a positive number"),
        (["--experts", "25%,0%"], r"experts '0%' is not valid: write a share"),
        (["--json", "nowhere/r.json"], r"--json nowhere/r\.json cannot be written: give a file in a directory that"),
        (["--prompts", "empty.txt"], r"empty\.txt has no text: give a text file with some"),
        (["--prompts", "binary"], r"binary is not UTF-8 text"),
        (["--prompts", "other.jsonl"], r"other\.jsonl line 1 has no text in prompt, question, text \(it has query\)"),
        (["--prompt-tokens", "300"], r"text\.txt is enough for 1 requests of 300 \+ 32 tokens, 5 are needed"),
        (["--perplexity-text", "missing"], r"missing cannot be read \(No such file"),
        (["--resume", "missing"], r"--resume missing: there is no such file: start with --json missing"),
        (["--resume", "other.jsonl"], r"--resume other\.jsonl is no comparison that this version"),
    ],
)
def test_a_comparison_that_cannot_be(
    refuse: Refuse, text: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], words: str
) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("refused before anything is loaded")

    monkeypatch.setattr("fate.bench.systems.load", load)
    Path("empty.txt").write_text(" \n")
    Path("binary").write_bytes(b"\x80\xff\x00")
    Path("other.jsonl").write_text('{"query": "a"}\n')
    line = refuse(2, "bench", "systems", tiny_store(FAMILY), "--prompts", text, "--systems", "load-on-demand", *argv)
    assert re.search(words, line), line


def test_plots_need_matplotlib(refuse: Refuse, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ("--prompts", text, "--systems", "load-on-demand", "--plots", "plots")
    line = refuse(2, "bench", "systems", tiny_store(FAMILY), *argv)
    assert line == "error: matplotlib is not installed: pip install 'fate-moe[plots]'\n"
    assert not Path("plots").exists()


def test_a_system_that_knows_the_future_is_for_comparisons(refuse: Refuse) -> None:
    line = refuse(2, "run", tiny_store(FAMILY), "hello", "--system", "fate-oracle")
    assert "system 'fate-oracle' must know the routing to come, which only fate bench systems has" in line


def test_the_systems_compared_by_default_exist() -> None:
    names = SYSTEMS.split(",")
    assert Comparison(tuple(names), ("25%",)).systems[-2:] == ("fate", "fate-hybrid")


@pytest.mark.parametrize("name", ["text", "systems"])
def test_help_with_an_example(cli: Cli, name: str) -> None:
    result = cli("bench", name, "--help")
    assert result.code == 0
    assert f"Example: fate bench {name} " in " ".join(result.out.split())
