"""Speed-ups, tables and plots of a document made of known figures."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from bench_support import GB, measured, run, workload
from fate.bench import plots, tables
from fate.bench.region import hit_region
from fate.bench.report import document
from fate.errors import MissingPackageError


def made() -> dict[str, Any]:
    comparison, found = measured()
    return document(Path("model.fate"), comparison, workload(), found)


def lines(table: Table) -> list[str]:
    console = Console(width=400, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_speedups_at_every_budget_and_the_best() -> None:
    found = made()["speedups"]
    assert [(row["link"], row["phase"], row["system"], row["over"]) for row in found] == [
        ("disk", "decode", "fate", "load-on-demand"),
        ("disk", "prefill", "fate", "load-on-demand"),
        ("1GB/s", "decode", "fate", "load-on-demand"),
        ("1GB/s", "prefill", "fate", "load-on-demand"),
    ]
    assert found[0]["by_experts"] == {"25%": pytest.approx(2.0), "50%": pytest.approx(3.0)}
    assert found[0]["best"] == "50%"


def test_the_links_speed_decides_the_bound() -> None:
    disk, emulated = (made()["cells"][at] for at in (0, 2))
    assert (disk["bytes_per_s"], disk["rho"]) == (2e9, pytest.approx(1.0))
    assert (emulated["bytes_per_s"], emulated["rho"]) == (1e9, pytest.approx(2.0))
    assert disk["systems"]["fate"]["prefill"]["bound_s_per_token"] == pytest.approx(0.1 / 2 / 10)
    assert emulated["systems"]["fate"]["prefill"]["bound_s_per_token"] == pytest.approx(0.1 / 10)


def test_a_disk_is_no_slower_than_it_was_in_a_run() -> None:
    comparison, found = measured()
    quick = run(0.01, 0.1, read=GB // 2)  # 50 GB/s in decoding
    found.cells[1].runs["fate"][1] = quick
    result = document(Path("model.fate"), comparison, workload(), found)
    assert [cell["bytes_per_s"] for cell in result["cells"]] == [50e9, 50e9, 1e9, 1e9]


def test_the_table_has_a_row_for_each_budget_and_system() -> None:
    found = made()
    assert tables.links(found) == ["disk", "1GB/s"]
    assert tables.link_title(found, "1GB/s") == "model.fate over 1GB/s: 1 GB/s, ρ 2.00"
    heading, *rows = lines(tables.comparison_table(found, "disk", "decode"))
    assert heading.split()[:3] == ["experts", "decode", "tok/s"]
    assert [row.split()[:2] for row in rows] == [
        [experts, system] for experts in ("25%", "50%") for system in ("load-on-demand", "cross-layer", "fate")
    ]
    # 4 tokens in 0.6 and in 1.2 s
    assert rows[2].split()[2:8] == ["5.00", "3.33", "-", "6.67", "2.00x", "50.0%"]
    assert rows[0].split()[6] == "-", "load-on-demand is what others are compared with"
    assert "TTFT" in lines(tables.comparison_table(found, "disk", "prefill"))[0]


def test_the_table_of_speedups() -> None:
    heading, *rows = lines(tables.speedup_table(made(), "1GB/s"))
    assert heading.split() == ["25%", "50%", "best"]
    # 10 misses of 0.02 s in 4 tokens of 0.1 s, twice
    assert rows[0].split("  ", 1)[0] == "fate vs load-on-demand, decode"
    assert rows[0].split("  ", 1)[1].split() == [
        *("2.00x", "(at", "most", "1.25)"),
        *("3.00x", "(at", "most", "1.25)"),
        "3.00x",
        "at",
        "50%",
    ]


def test_where_what_is_predicted_fits_the_link() -> None:
    found = made()
    for cell, (share, hits, perfect) in zip(
        found["cells"], ((0.9, 0.995, 1.0), (1.0, 0.98, 1.0), (1.1, 0.6, 0.96), (None, 0.5, 0.9)), strict=True
    ):
        cell["systems"]["fate"]["decode"] |= {
            "predicted_link_share": share,
            "hit_rate": hits,
            "hits_of_perfect": perfect,
        }
    region = found["hit_region"] = hit_region(found["cells"], found["comparison"]["systems"])
    assert region is not None
    assert [(cell["fits"], cell["reached"]) for cell in region["cells"]] == [
        *((True, True), (True, False)),
        *((False, True), (False, False)),
    ]
    heading, *rows = lines(tables.region_table(found))
    assert heading.split()[-2:] == ["25%", "50%"]
    assert rows[0].split() == ["disk,", "ρ", "1.00", "99.5%", "(0.90)*", "98.0%", "(1.00)*"]
    assert rows[1].split() == ["1GB/s,", "ρ", "2.00", "60.0%", "(1.10)", "50.0%", "(-)"]
    assert tables.region_notes(found)[1] == (
        "At least 99% hit in 1 of 2 cells where it fits (not: disk 50%); at least 95% of a perfect predictor's hits in "
        "1 of 2 others (not: 1GB/s 50%)."
    )
    assert hit_region(found["cells"], ["eap"]) is None


def test_lossy_systems_say_so_and_what_they_cost() -> None:
    found = made()
    row = found["cells"][0]["systems"]["cross-layer"]
    row["exact"] = False
    row["perplexity_change"] = {
        "a.txt": {"change": 0.0123, "standard_error": 0.004},
        "b.txt": {"change": -0.001, "standard_error": None},
    }
    assert "perplexity" not in lines(tables.comparison_table(found, "disk", "prefill"))[0]
    found["perplexity"] = {}
    shown = lines(tables.comparison_table(found, "disk", "prefill"))[2]
    assert "cross-layer (lossy)" in shown
    assert shown.endswith("+1.23% ± 0.40% / -0.10%")


def test_notes_are_shown_with_their_cell() -> None:
    found = made()
    before = tables.notes(found, "disk")
    assert before[0] == "decode, ρ 1.00: load-on-demand is link-bound (reads for longer than it computes) at no budget"
    assert before[1].startswith("prefill, ρ 1.00: load-on-demand is link-bound")
    assert before[1].endswith("at every budget")
    assert "at most" in before[2]
    found["cells"][1]["systems"]["fate"]["notes"] = ["prefetching is off: it lost"]
    found["compute"]["resident"] = False
    assert tables.notes(found, "disk")[4:] == ["50%, fate: prefetching is off: it lost"]
    assert "not all experts fit in memory" in tables.notes(found, "disk")[3]
    assert len(tables.notes(found, "1GB/s")) == 4


def test_plots_are_written(tmp_path: Path) -> None:
    found = made()
    events = [
        {"start_s": 0.001 * at, "end_s": 0.001 * at + 0.0005, "kind": kind, "layer": 0, "expert": 1, "num_bytes": 9}
        for at, kind in enumerate(("layer", "predict", "prefetch", "demand", "stall", "compute"))
    ]
    found["cells"][1]["timelines"] = {
        name: {"seconds": 0.01, "events": events} for name in found["comparison"]["systems"]
    }
    written = plots.draw(found, tmp_path / "new" / "plots")
    assert [path.name for path in written] == [
        "speed.png",
        "hit-rate-disk.png",
        "timeline-disk.png",
        "hit-rate-1GB-s.png",
        "hit-region.png",
    ]
    for path in written:
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", head[16:24])
        assert width > 600
        assert height > 300
        assert path.stat().st_size > 10_000, "an empty page is smaller"


def test_a_system_looks_the_same_everywhere() -> None:
    assert plots.style("fate", ["fate", "other"]) == plots.style("fate", ["other", "eap", "fate"])
    every = [*plots.STYLES, "mine", "yours", "theirs"]
    looks = [plots.style(system, every) for system in every]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(every)


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"^matplotlib is not installed: pip install 'fate-moe\[plots\]'$"):
        plots.check_plots()
