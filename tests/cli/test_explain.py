"""`fate run --explain`, and where the engine's notes go."""

from __future__ import annotations

import io
import re
import sys

import pytest

from cli_support import FAMILY, Cli
from fate.engine import assembly
from fate.engine.switch import PrefetchSwitch
from tiny import tiny_store

TITLE = "layer total experts stall predict hit rate recall@k coverage demanded prefetched wasted gain"
ON_DEMAND = ("--system", "load-on-demand")


def explain(cli: Cli, *options: object, new: int = 8) -> tuple[list[str], dict]:
    """What is printed after the summary, and the JSON."""
    result = cli("run", tiny_store(FAMILY, eos_token_id=None), "Once", "--explain", "--json", "--max-new-tokens", new,
                 *options)  # fmt: skip
    assert result.code == 0, result.err
    assert TITLE.split()[1] not in result.out.splitlines()[0], "the report is on standard error"
    lines = result.err.splitlines()
    (summary,) = [at for at, line in enumerate(lines) if " · TTFT " in line]
    return lines[summary + 1 :], result.json["explain"]


def test_every_layer_has_a_row(cli: Cli) -> None:
    lines, report = explain(cli, "--experts", "50%", "--system", "cross-layer")
    prompt, heading, title, *rows, words = lines
    assert re.match(r"prompt, 4 tokens in [\d.]+ ms: experts [\d.]+ ms, stall [\d.]+ ms, predict ", prompt)
    assert heading == "decoding, mean of 7 tokens: times in ms, reads in KiB"
    assert title.split() == TITLE.split()
    names = [re.split(r"  +", row)[0] for row in rows]
    assert names == ["0", "1", "2", "all layers", "outside the experts"]
    cells = [re.split(r"  +", row)[1:] for row in rows]
    assert [len(row) for row in cells] == [11, 11, 11, 11, 1]
    assert all(re.fullmatch(r"-|[+-]?\d+\.\d+%?", cell) for row in cells for cell in row), cells
    assert words == report["words"]
    assert words.startswith("prefetching saved ")
    decode = report["decode"]
    assert float(cells[3][0]) == pytest.approx(1000 * decode["all_layers"]["total_s"] / 7, abs=0.01)
    assert float(cells[4][0]) == pytest.approx(1000 * decode["outside_experts_s"] / 7, abs=0.01)
    assert float(cells[3][7]) == pytest.approx(decode["all_layers"]["demand_bytes"] / 7 / 1024, abs=0.01)
    assert sum(layer["gain_s"] for layer in decode["layers"] if layer["gain_s"]) == pytest.approx(
        decode["all_layers"]["gain_s"]
    )


def test_a_system_that_does_not_guess_has_no_gain(cli: Cli) -> None:
    lines, report = explain(cli, "--experts", "50%", *ON_DEMAND)
    assert all(row.split()[6:8] == ["-", "-"] and row.split()[-1] == "-" for row in lines[3:6]), lines
    assert lines[-1].startswith("this system does not prefetch: layers waited ")
    assert report["decode"]["all_layers"]["gain_s"] is None


def test_a_run_of_one_token_has_no_table(cli: Cli) -> None:
    lines, report = explain(cli, "--experts", "50%", *ON_DEMAND, new=1)
    assert [line.split()[0] for line in lines] == ["prompt,", "this"]
    assert report["decode"]["tokens"] == 0


def test_it_is_in_the_json_even_where_it_is_not_printed(cli: Cli) -> None:
    result = cli("run", tiny_store(FAMILY), "Once", "--explain", "-q", "--json", "--max-new-tokens", 3)
    assert result.err == ""
    assert len(result.json["explain"]["decode"]["layers"]) == 3
    assert "explain" not in cli("run", tiny_store(FAMILY), "Once", "--json", "--max-new-tokens", 3).json


@pytest.fixture
def switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefetching is found to lose in the third step."""

    class Loses(PrefetchSwitch):
        steps = 0

        def end_step(self) -> None:
            self.steps += 1
            if self.steps == 3:
                self.announce("prefetching is off: it lost")

    monkeypatch.setattr(assembly, "PrefetchSwitch", Loses)


@pytest.mark.usefixtures("switched_off")
def test_a_note_comes_after_the_text(cli: Cli, caplog: pytest.LogCaptureFixture) -> None:
    store = tiny_store(FAMILY, eos_token_id=None)
    result = cli("run", store, "Once", "--max-new-tokens", 8, "--json")
    assert caplog.text == "", "a line of the log would stand in the middle of the text"
    assert result.err.splitlines()[-2] == "prefetching is off: it lost"
    assert " · TTFT " in result.err.splitlines()[-1]
    assert result.json["notes"] == ["prefetching is off: it lost"]
    assert cli("run", store, "Once", "--max-new-tokens", 3, "--json").json["notes"] == []


@pytest.mark.usefixtures("switched_off")
def test_in_a_conversation_it_comes_once_after_its_answer(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAnd then?\n"))
    result = cli("chat", tiny_store(FAMILY, eos_token_id=None), "-q", "--max-new-tokens", 8)
    assert (result.code, result.err) == (0, "prefetching is off: it lost\n")
