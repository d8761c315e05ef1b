"""The comparison on a tiny store: its order, its pace, its document, and what an interruption leaves."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from bench_support import request, workload
from fate.bench import systems as systems_module
from fate.bench.comparison import Comparison
from fate.bench.environment import peak_resident_bytes
from fate.bench.passes import Pass, feed
from fate.bench.quality import Quality
from fate.bench.report import document, write_json
from fate.bench.systems import SystemsBench
from fate.core import StepStats
from fate.engine.session import FateModel, Session
from tiny import tiny_store

STORE = "qwen2_moe"
SYSTEMS = ("load-on-demand-uncached", "load-on-demand", "cross-layer")


def silent(done: int, total: int, what: str) -> None: ...


def no_transfer_threads() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("fate-transfer")]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """Three systems, two budgets, disk and an emulated link, with timelines and perplexity."""
    systems = (*SYSTEMS, "fate-oracle", "cross-layer-int2")
    comparison = Comparison(systems, ("50%", "80%"), ("disk",), (1.0,), repeats=2, settle_tokens=4, timelines=True)
    text = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(9))
    quality = _CountedQuality({"some.txt": text}, 12)
    work = workload()
    bench = SystemsBench(comparison, work, quality)
    bench.run(tiny_store(STORE), silent)
    assert no_transfer_threads()
    assert quality.count == 1, "an INT2 system gives the same in all four cells"
    return document(tiny_store(STORE), comparison, work, bench.measured, quality)


class _CountedQuality(Quality):
    count = 0

    def measure(self, model: FateModel) -> dict[str, Any]:
        self.count += 1
        return super().measure(model)


def test_every_cell_is_there(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False))["cells"] == result["cells"]
    assert result["complete"] is True
    assert [(cell["link"], cell["experts"]) for cell in result["cells"]] == [
        ("disk", "50%"),
        ("disk", "80%"),
        ("ρ 1", "50%"),
        ("ρ 1", "80%"),
    ]
    assert [cell["share"] for cell in result["cells"]] == [0.5, 19 / 24] * 2
    assert len(result["workload"].pop("token_ids_sha256")) == 64
    assert result["workload"] == {
        "prompts": ["file 0"],
        "prompt_tokens": 12,
        "new_tokens": 4,
        "recorded_requests": 2,
    }
    assert result["environment"]["kernels"]
    assert 0 < result["peak_resident_bytes"] <= peak_resident_bytes()


def test_what_a_row_says(result: dict[str, Any]) -> None:
    for cell in result["cells"]:
        assert list(cell["systems"]) == [*SYSTEMS, "fate-oracle", "cross-layer-int2"]
        for name, row in cell["systems"].items():
            assert row["exact"] is (name != "cross-layer-int2")
            assert (row["slots"], len(row["repeats"])) == ({"50%": 12, "80%": 19}[cell["experts"]], 2)
            for phase, tokens in (("prefill", 12), ("decode", 4)):
                assert [repeat[phase]["tokens"] for repeat in row["repeats"]] == [tokens] * 2
                assert row[phase]["tokens_per_s_range"][0] <= row[phase]["tokens_per_s"]
                assert row[phase]["time_over_bound"] > 0
                assert len(row["layer_hit_rate"][phase]) == 3
        assert cell["systems"]["cross-layer"]["decode"]["recall"] > 0
        assert cell["systems"]["load-on-demand"]["decode"]["recall"] is None
        assert set(cell["systems"]["cross-layer"]["decode"]["speedup_over"]) == {*SYSTEMS[:2], "fate-oracle"}


def test_an_oracle_is_never_wrong(result: dict[str, Any]) -> None:
    repeats = [r["decode"] for c in result["cells"] for r in c["systems"]["fate-oracle"]["repeats"]]
    assert all(decode["recalled"] == decode["asked"] > 0 for decode in repeats)
    assert sum(decode["covered"] for decode in repeats) > 0
    late = 3  # of the first layer after a prompt, which nothing foretells
    assert all(decode["covered"] >= decode["uncached"] - late for decode in repeats)


def test_bytes_are_those_of_the_systems(result: dict[str, Any]) -> None:
    record, top_k, layers = result["compute"]["record_bytes"], 3, 3
    for cell in result["cells"]:
        read = {name: row["decode"]["bytes_per_token"] for name, row in cell["systems"].items()}
        assert read["load-on-demand-uncached"] == record * top_k * layers
        assert 0 < read["load-on-demand"] < read["load-on-demand-uncached"]
        fewest = {row["decode"]["belady_bytes_per_token"] for row in cell["systems"].values()}
        assert len(fewest) == 1
        assert fewest.pop() <= read["load-on-demand"]
        assert cell["systems"]["load-on-demand-uncached"]["decode"]["hit_rate"] == 0


def test_a_rho_gives_a_link_its_speed(result: dict[str, Any]) -> None:
    disk, emulated = result["cells"][0], result["cells"][2]
    assert disk["bytes_per_s"] == result["disk_read_bytes_per_s"]
    assert emulated["rho"] == pytest.approx(1.0)
    compute = result["compute"]
    assert emulated["bytes_per_s"] == pytest.approx(compute["record_bytes"] / compute["layer_s"])
    assert compute["resident"] is True
    uncached = emulated["systems"]["load-on-demand-uncached"]["decode"]
    assert uncached["tokens_per_s"] * uncached["bytes_per_token"] < emulated["bytes_per_s"], "no faster than its link"
    assert uncached["time_over_bound"] > 1


def test_one_token_in_time_with_the_middle_budget(result: dict[str, Any]) -> None:
    for cell in result["cells"]:
        assert list(cell["timelines"]) == (
            [*SYSTEMS, "fate-oracle", "cross-layer-int2"] if cell["experts"] == "80%" else []
        )
    timeline = result["cells"][3]["timelines"]["load-on-demand-uncached"]
    kinds = {event["kind"] for event in timeline["events"]}
    assert kinds >= {"layer", "demand", "compute"}
    assert sum(event["num_bytes"] for event in timeline["events"] if event["kind"] == "demand") > 0
    assert all(0 <= e["start_s"] <= e["end_s"] <= timeline["seconds"] for e in timeline["events"])


def test_perplexity_is_of_lossy_systems_against_exact_ones(result: dict[str, Any]) -> None:
    assert result["perplexity"]["settings"]["window_tokens"] == 12
    assert result["perplexity"]["exact"]["some.txt"]["tokens"] == 40 - 4, "the first of each window is given"
    for cell in result["cells"]:
        assert cell["systems"]["cross-layer"]["perplexity_change"] is None
        found = cell["systems"]["cross-layer-int2"]["perplexity_change"]["some.txt"]
        assert found["change"] != 0
        assert abs(found["change"]) < 0.5
        assert 0 < found["standard_error"] < 0.5


def test_systems_alternate_and_links_are_paced_when_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, Any]] = []
    real_reconfigure, real_set_link = Session.reconfigure, Session.set_link

    def reconfigure(self: Session, **options: Any) -> None:
        log.append(("engine", options["system"].name))
        real_reconfigure(self, **options)

    def set_link(self: Session, bytes_per_s: float | None) -> None:
        log.append(("pace", bytes_per_s))
        real_set_link(self, bytes_per_s)

    def noted(model: Any, ids: torch.Tensor, prompt_tokens: int) -> Pass:
        log.append(("feed", names[tuple(ids[0].tolist())]))
        return feed(model, ids, prompt_tokens)

    work = workload()
    names = {tuple(r.ids[0].tolist()): r.file for r in (*work.measured, *work.recorded)}
    names[tuple(work.recorded[1].ids[0, -5:].tolist())] = "the end of file 2"
    monkeypatch.setattr(Session, "reconfigure", reconfigure)
    monkeypatch.setattr(Session, "set_link", set_link)
    monkeypatch.setattr(systems_module, "feed", noted)
    names_of = ("cross-layer", "fate", "load-on-demand-uncached")
    comparison = Comparison(names_of, ("50%",), ("50MB/s",), repeats=2, settle_tokens=11)
    SystemsBench(comparison, work).run(tiny_store(STORE), silent)

    assert [what for kind, what in log if kind == "engine"] == list(names_of) * 2
    first = log.index(("engine", "cross-layer"))
    second = log.index(("engine", "fate"))
    third = log.index(("engine", "load-on-demand-uncached"), second)
    fourth = log.index(("engine", "cross-layer"), third)
    warm_up = [("feed", "file 1"), ("feed", "file 2"), ("feed", "the end of file 2")]
    assert log[first + 1 : second] == [("pace", None), *warm_up, ("pace", 50e6), ("feed", "file 0")]
    assert log[second + 1 : third] == [*warm_up, ("feed", "file 0")], "it switches itself off by what it measures"
    bare = [("pace", None), ("feed", "file 1"), ("pace", 50e6), ("feed", "file 0")]
    assert log[third + 1 : fourth] == bare, "without a cache there is nothing to get used to"


def test_steps_are_counted_to_the_end() -> None:
    seen: list[tuple[int, int, str]] = []
    comparison = Comparison(("load-on-demand",), ("50%", "80%"), repeats=2, settle_tokens=0)
    SystemsBench(comparison, workload(1)).run(tiny_store(STORE), lambda *step: seen.append(step))
    assert seen[0] == (0, 5, "loading")
    assert [done for done, _, _ in seen[1:]] == list(range(5))
    assert {total for _, total, _ in seen} == {5}
    assert seen[-1][2] == "disk, 80%: load-on-demand, 2 of 2"


def test_an_interruption_leaves_the_finished_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = systems_module.SystemsBench.measure, []

    def interrupted(self: SystemsBench, model: Any) -> Any:
        calls.append(model)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, model)

    monkeypatch.setattr(SystemsBench, "measure", interrupted)
    comparison = Comparison(("load-on-demand",), ("50%", "80%"), repeats=1, settle_tokens=0)
    bench = SystemsBench(comparison, workload(1))
    with pytest.raises(KeyboardInterrupt):
        bench.run(tiny_store(STORE), silent)
    assert no_transfer_threads()
    found = document(tiny_store(STORE), comparison, workload(1), bench.measured)
    assert found["complete"] is False
    assert [cell["experts"] for cell in found["cells"]] == ["50%"]


def test_a_pass_is_timed_and_counted_by_phase() -> None:
    import fate

    with fate.load(tiny_store(STORE), experts="50%", prefill_chunk=5, max_context=32, on_plan=lambda *_: None) as model:
        feed(model, request(3).ids, 12)
        found = feed(model, request(4).ids, 12)
    assert (found.prompt_tokens, found.new_tokens) == (12, 4)
    assert (found.stats.prefill.tokens, found.stats.prefill.forwards) == (12, 3), "in chunks of 5"
    assert (found.stats.decode.tokens, found.stats.decode.forwards) == (4, 4)
    assert found.ttft_s >= found.stats.prefill.total_s > 0
    assert found.decode_s >= found.stats.decode.total_s > 0
    assert found.stats.total != StepStats()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("before")
    with pytest.raises(TypeError):
        write_json({"a": 1, "b": object()}, path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("result.json", "before")]
    write_json({"b": 1, "a": [2.5]}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == '{"a": [2.5], "b": 1}\n'
