"""Going on with a comparison: what is finished stands, and nothing that was measured differently does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench_support import measured, request, workload
from fate.bench.comparison import Comparison, Workload
from fate.bench.quality import Quality
from fate.bench.report import document, write_json
from fate.bench.resume import read_comparison, resume
from fate.bench.systems import Measured, SystemsBench
from fate.errors import UsageError
from tiny import tiny_store

STORE = Path("model.fate")


def saved(**changes: Any) -> tuple[Comparison, Measured, dict[str, Any]]:
    comparison, found = measured()
    found.fingerprint = "abc"
    return comparison, found, json.loads(json.dumps(document(STORE, comparison, workload(), found) | changes))


def test_cells_are_as_they_were() -> None:
    comparison, found, file = saved()
    again = resume(Path("r.json"), file, "abc", comparison, workload())
    assert again.compute == found.compute
    assert [(cell.link, cell.experts, cell.minimum) for cell in again.cells] == [
        (cell.link, cell.experts, cell.minimum) for cell in found.cells
    ]
    assert document(STORE, comparison, workload(), again)["cells"] == file["cells"]
    assert SystemsBench(comparison, workload(), measured=again).complete


def test_links_and_budgets_may_be_added() -> None:
    comparison, _, file = saved()
    more = replace(comparison, experts=("10%", *comparison.experts), rhos=(2.0,))
    again = resume(Path("r.json"), file, "abc", more, workload())
    assert not SystemsBench(more, workload(), measured=again).complete
    fewer = replace(comparison, links=("disk",))
    with pytest.raises(
        UsageError, match=r"^--resume r.json has a cell of link 1GB/s with 25% of the experts, which is"
    ):
        resume(Path("r.json"), file, "abc", fewer, workload())


TEXT = Quality({"a.txt": torch.arange(9)}, 4)


@pytest.mark.parametrize(
    "fingerprint, changes, work, quality, words",
    [
        ("abd", {}, workload(), None, r"another store \(abc, now abd\)"),
        ("abc", {"repeats": 3}, workload(), None, r"another repeats \(2, now 3\)"),
        ("abc", {"timelines": True}, workload(), None, r"another choice of --plots \(False, now True\)"),
        (
            "abc",
            {"systems": ("load-on-demand",)},
            workload(),
            None,
            r"another systems \(load-on-demand,cross-layer,fate,",
        ),
        ("abc", {}, Workload([request(7)], workload().recorded), None, r"another prompts \(file 0, now file 7\)"),
        ("abc", {}, workload(3), None, r"another recorded requests \(2, now 3\)"),
        ("abc", {}, Workload(workload().measured, [request(1), request(9)]), None, "another token ids sha256"),
        ("abc", {}, workload(), TEXT, r"another perplexity text \(None, now"),
    ],
)
def test_what_differs_is_named(
    fingerprint: str, changes: dict[str, Any], work: Workload, quality: Quality | None, words: str
) -> None:
    comparison, _, file = saved()
    with pytest.raises(UsageError, match=rf"^--resume r.json was measured with {words}") as info:
        resume(Path("r.json"), file, fingerprint, replace(comparison, **changes), work, quality)
    assert "\n" not in str(info.value)


def test_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, _, file = saved()
    file["environment"]["processor"] = "a slower one"
    with pytest.raises(UsageError, match=r"another processor \(a slower one, now "):
        resume(Path("r.json"), file, "abc", comparison, workload())


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "there is no such file: start with --json"),
        ("{", "is no comparison that this version"),
        ('{"bench": "peers"}', "is no comparison that this version"),
        ('{"bench": "systems", "cells": []}', "is no comparison that this version"),
    ],
)
def test_what_is_no_comparison(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "r.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_comparison(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_comparison(tmp_path)


@pytest.mark.parametrize("part", ["cells", "compute", "environment"])
def test_a_comparison_that_lacks_something(part: str) -> None:
    comparison, _, file = saved(**{part: None})
    with pytest.raises(UsageError, match="is no comparison that this version"):
        resume(Path("r.json"), file, "abc", comparison, workload())


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, file = tiny_store("qwen2_moe"), tmp_path / "r.json"
    comparison = Comparison(("load-on-demand", "fate"), ("50%", "80%"), (), (1.0,), repeats=1, settle_tokens=0)
    work = workload(1)
    bench = SystemsBench(comparison, work)

    def save_and_die() -> None:
        write_json(document(store, comparison, work, bench.measured), file)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(store, lambda *_: None, save_and_die)
    found = read_comparison(file)
    assert (found["complete"], len(found["cells"])) == (False, 1)

    steps: list[str] = []
    again = resume(file, found, found["store_fingerprint"], comparison, work)
    second = SystemsBench(comparison, work, measured=again)
    second.run(store, lambda done, total, what: steps.append(f"{total} {what}"))
    assert [step for step in steps if "50%" in step] == []
    assert steps[-1] == "3 ρ 1, 80%: fate, 1 of 1"
    whole = document(store, comparison, work, second.measured)
    assert whole["complete"] is True
    assert whole["cells"][0] == found["cells"][0]
    assert whole["cells"][1]["bytes_per_s"] == found["cells"][0]["bytes_per_s"], "of the compute measured then"
