"""Commands that succeed: what they print, write and leave behind."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import fate
from cli_support import FAMILY, Cli, copied
from fate.cli.app import COMMANDS
from fate.store.reader import EXPERTS_FILE, PACKED_FILE, is_store
from fate.store.writer import StoreWriter
from fate.systems import EXACT, resolve_system
from fate.tools.synth import store as synth_module
from tiny import FAMILIES, tiny_checkpoint, tiny_store


def test_run_streams_text_and_says_how_it_went(cli: Cli) -> None:
    result = cli("run", tiny_store(FAMILY), "Once", "--experts", "50%", "--max-new-tokens", 12, "--json")
    assert result.code == 0, result.err
    default = resolve_system(EXACT).name
    assert result.err.startswith(f"system {default}\nruntime ")
    assert re.search(r"^expert slots .* for 24 experts \(50%\)$", result.err, re.M)
    summary = result.err.splitlines()[-1]
    assert re.fullmatch(
        r"4 \+ 12 tokens · TTFT [\d.]+ s · [\d.]+ tok/s · hit rate [\d.]+% · [\d.]+ K?i?B/token read · stall [\d.]+%",
        summary,
    ), summary
    report = result.json
    assert (report["prompt_tokens"], report["new_tokens"]) == (4, 12)
    assert report["system"] == default
    assert 0 < report["hit_rate"] <= 1
    assert report["slots"] == 12
    assert not [t for t in threading.enumerate() if t.name.startswith("fate-transfer")]


def test_run_is_quiet_when_asked(cli: Cli) -> None:
    result = cli("run", tiny_store(FAMILY), "Once", "--max-new-tokens", 3, "-q")
    assert (result.code, result.err) == (0, "")


def test_a_seed_makes_sampling_reproducible(cli: Cli) -> None:
    def text(seed: int) -> str:
        return cli("run", tiny_store(FAMILY), "Once", "--temperature", 1, "--max-new-tokens", 24, "--seed", seed).out

    assert text(1) == text(1) != text(2)


def test_chat_wraps_the_prompt_in_the_template(cli: Cli) -> None:
    result = cli("run", tiny_store(FAMILY), "Hi", "--chat", "--max-new-tokens", 2, "--json")
    assert result.json["prompt_tokens"] == len("user: Hi\nassistant:")


def test_a_checkpoint_is_converted_once(cli: Cli, tmp_path: Path) -> None:
    assert cli("run", tiny_checkpoint(FAMILY), "Hi", "--max-new-tokens", 2).code == 0
    (store,) = (tmp_path / "cache").iterdir()
    before = (store / EXPERTS_FILE).stat().st_mtime_ns
    assert cli("run", tiny_checkpoint(FAMILY), "Hi", "--max-new-tokens", 2).code == 0
    assert (store / EXPERTS_FILE).stat().st_mtime_ns == before


def test_convert_names_the_store_after_its_source(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = copied(tiny_checkpoint(FAMILY), tmp_path / "my model")
    result = cli("convert", f"{source}/")
    assert result.code == 0, result.err
    assert re.fullmatch(r"my model\.fate: [\d.]+ [KM]iB; try it with\n", result.err), "no bar, as no one watches"
    assert result.out == "fate run 'my model.fate' \"Once upon a time\"\n"
    assert is_store("my model.fate")
    monkeypatch.chdir(source)
    assert cli("convert", ".").code == 0
    assert is_store("my model.fate")


def test_convert_names_the_store_after_a_hub_id(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = copied(tiny_checkpoint(FAMILY), tmp_path / "snapshots" / "0123456789abcdef")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(snapshot))
    assert cli("convert", "org/name").code == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["name.fate"]


def test_convert_goes_on_where_it_stopped(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = StoreWriter.write_record, []

    def write_record(self: StoreWriter, layer: int, expert: int, record: Any) -> None:
        real(self, layer, expert, record)
        written.append((layer, expert))
        if len(written) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(StoreWriter, "write_record", write_record)
    result = cli("convert", tiny_checkpoint(FAMILY), "out.fate")
    assert (result.code, result.err) == (130, "stopped: the same command goes on from here\n")
    assert [path.name for path in Path.cwd().iterdir()] == ["out.fate.partial"]
    assert cli("convert", tiny_checkpoint(FAMILY), "out.fate").code == 0
    assert len(written) == len(set(written)) == 24
    assert [path.name for path in Path.cwd().iterdir()] == ["out.fate"]


def test_an_interrupted_run_leaves_no_thread_behind(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object, value: object) -> None:
        assert [t for t in threading.enumerate() if t.name.startswith("fate-transfer")]
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.TextStreamer.put", interrupted)
    assert cli("run", tiny_store(FAMILY), "Once").code == 130
    assert not [t for t in threading.enumerate() if t.name.startswith("fate-transfer")]


@pytest.mark.parametrize("make", [tiny_store, tiny_checkpoint])
def test_inspect_names_a_budget_that_loads(cli: Cli, make: Callable[[str], Path]) -> None:
    result = cli("inspect", make(FAMILY), "--json")
    assert result.code == 0, result.err
    assert result.err == ""
    assert all(line == line.rstrip() for line in result.out.splitlines())
    assert "3 layers x 8, 3 per token" in result.out
    report = result.json
    assert report["is_store"] is (make is tiny_store)
    assert report["dense_bytes"] < 2 * (tiny_store(FAMILY) / PACKED_FILE).stat().st_size
    smallest = re.search(r"--memory (\d+MiB) for a context of 512", result.out)[1]
    with fate.load(tiny_store(FAMILY), memory=smallest) as model:
        assert model.fate.plan.total <= model.fate.plan.budget


@pytest.mark.parametrize("make", [tiny_store, tiny_checkpoint])
def test_inspect_on_a_text(cli: Cli, tmp_path: Path, make: Callable[[str], Path]) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox " * 20)
    result = cli("inspect", make(FAMILY), "--text", tmp_path / "text.txt", "--max-tokens", 70, "--json")
    assert result.code == 0, result.err
    assert result.err == ""
    assert f"70 tokens of {tmp_path / 'text.txt'}" in result.out
    title, *rows = result.out.splitlines()[-6:-1]
    assert title.split() == ["layer", "cosine", "to", "next", "recall@3", "at", "6", "busiest/mean"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "mean"]
    assert re.fullmatch(r" +1 +0\.\d{3} +\d+\.\d% +\d+\.\d% +\d\.\d{3}", rows[1])
    similarity = result.json["similarity"]
    assert similarity["tokens"] == 70
    recalls = [layer["recall_at_k"] for layer in similarity["layers"]]
    assert recalls[0] is None
    assert similarity["mean"]["recall_at_k"] == pytest.approx(sum(recalls[1:]) / 2)


def test_figures_of_a_checkpoint_are_those_of_its_store(cli: Cli) -> None:
    for family in ("qwen2_moe", "qwen3_moe"):  # the second has tied embeddings
        before, after = (cli("inspect", make(family), "--json").json for make in (tiny_checkpoint, tiny_store))
        assert before["expert_bytes"] == after["expert_bytes"]
        headers = 16384  # of two tensor files
        assert abs(before["dense_bytes"] - after["dense_bytes"]) < headers


def test_eval(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox " * 20)
    argv = ("eval", tiny_store(FAMILY), "--text", tmp_path / "text.txt", "--max-context", 64, "--max-tokens", 130)
    result = cli(*argv, "--json")
    assert result.code == 0, result.err
    assert re.match(r"perplexity [\d.]+ · [\d.]+ nats/token · 127 tokens · ", result.out)
    assert result.json["tokens"] == 127
    assert 50 < result.json["perplexity"] < 2000, "about as bad as chance among 259"


def test_doctor(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fate.tools.diagnosis.disk_read_gb_per_s", lambda path: (True, 2.5))
    monkeypatch.setattr("fate.tools.diagnosis.memory_read_gb_per_s", lambda: 20.0)
    result = cli("doctor", "--path", tmp_path, "--json")
    assert result.code == 0, result.err
    assert re.search(r"^disk read +2\.5 GB/s$", result.out, re.M)
    assert re.search(r"^O_DIRECT +yes$", result.out, re.M)
    assert result.json["memory_read_gb_per_s"] == 20.0


def test_synth(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {**FAMILIES[FAMILY], "model_type": FAMILY, "vocab_size": 9600, "max_position_embeddings": 256}
    monkeypatch.setitem(synth_module.MODELS, "qwen1.5-moe-a2.7b", tiny)
    result = cli("synth", "qwen1.5-moe-a2.7b", "out.fate", "--num-layers", 2)
    assert result.code == 0, result.err
    assert re.fullmatch(r"out\.fate: [\d.]+ MiB written\n", result.err)
    assert cli("run", "out.fate", "Once upon", "--max-new-tokens", 2).code == 0


def test_synth_of_a_checkpoint(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {**FAMILIES[FAMILY], "model_type": FAMILY, "vocab_size": 9600, "max_position_embeddings": 256}
    monkeypatch.setitem(synth_module.MODELS, "qwen1.5-moe-a2.7b", tiny)
    result = cli("synth", "qwen1.5-moe-a2.7b", "source", "--checkpoint")
    assert result.code == 0, result.err
    assert re.fullmatch(r"source: [\d.]+ MiB written\n", result.err)
    assert cli("convert", "source", "out.fate").code == 0
    refused = cli("synth", "qwen1.5-moe-a2.7b", "other", "--checkpoint", "--dense-bits", 8)
    assert (refused.code, Path("other").exists()) == (2, False)
    assert "--dense-bits 8 is of a store" in refused.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(cli: Cli, command: str) -> None:
    result = cli(command, "--help")
    assert result.code == 0
    assert f"Usage: fate {command} " in result.out
    assert f"Example: fate {command} " in " ".join(result.out.split())


def test_names_with_brackets_and_colons_are_shown_as_they_are(cli: Cli, tmp_path: Path) -> None:
    store = copied(tiny_store(FAMILY), tmp_path / "a[bold]:smile:b")
    assert str(store) in cli("inspect", store).out
