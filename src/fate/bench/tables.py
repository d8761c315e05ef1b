"""The tables of a comparison's document: for each link, a row per budget and system, and the speed-ups.

vs LoD: median of paired ratios to load-on-demand. covered: see `core.StepStats`. /bound: time over the least in which
this could be computed and these bytes moved. /Bélády: bytes over the fewest any cache of this size needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from fate.memory import format_bytes

Row = Mapping[str, Any]
_ABSENT = "-"
_REFERENCE = "load-on-demand"


def links(document: Row) -> list[str]:
    """Names of the links that cells were measured on, in order."""
    return list(dict.fromkeys(cell["link"] for cell in document["cells"]))


def link_title(document: Row, link: str) -> str:
    """qwen.fate over 12GB/s: 12.00 GB/s, ρ 0.45"""
    cell = next(cell for cell in document["cells"] if cell["link"] == link)
    return f"{document['store']} over {link}: {cell['bytes_per_s'] / 1e9:.3g} GB/s, ρ {cell['rho']:.2f}"


def comparison_table(document: Row, link: str, phase: str) -> Table:
    """Rows: budget x system. phase: "decode" or "prefill"."""
    columns = _COLUMNS
    if phase == "prefill":
        columns = {**columns, "TTFT": lambda row, _: f"{row['ttft_s']:.2f} s"}
        if "perplexity" in document:
            columns["perplexity"] = lambda row, _: _perplexity(row)
    table = Table(box=None, pad_edge=False)
    for heading in ("experts", phase):
        table.add_column(heading, no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right")
    for cell in document["cells"]:
        if cell["link"] == link:
            for name in document["comparison"]["systems"]:
                row = cell["systems"][name]
                label = name if row["exact"] else f"{name} (lossy)"
                table.add_row(cell["experts"], label, *(show(row, row[phase]) for show in columns.values()))
    return table


def speedup_table(document: Row, link: str) -> Table:
    """How many times as fast as each baseline: the median of paired ratios at each budget."""
    rows = [row for row in document["speedups"] if row["link"] == link]
    budgets = list(dict.fromkeys(cell["experts"] for cell in document["cells"] if cell["link"] == link))
    table = Table("", *budgets, "best", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        ratios = row["by_experts"]
        cells = [f"{ratios[budget]:.2f}x" if budget in ratios else _ABSENT for budget in budgets]
        words = f"{row['system']} vs {row['over']}, {row['phase']}"
        table.add_row(words, *cells, f"{ratios[row['best']]:.2f}x at {row['best']}")
    return table


def notes(document: Row, link: str) -> list[str]:
    """What engines decided by measurement, and what else a reader of the table must know."""
    found = []
    if not document["compute"]["resident"]:
        found.append("not all experts fit in memory: the bound takes compute from a run less its stalls")
    for cell in document["cells"]:
        if cell["link"] == link:
            for name, row in cell["systems"].items():
                found += [f"{cell['experts']}, {name}: {note}" for note in row["notes"]]
    return found


def _share(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.1%}"


def _times(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.2f}"


def _over_reference(phase: Row) -> str:
    ratio = phase["speedup_over"].get(_REFERENCE)
    return _ABSENT if ratio is None else f"{ratio['median']:.2f}x"


def _perplexity(row: Row) -> str:
    changes = row["perplexity_change"]
    return " / ".join(f"{change:+.2%}" for change in changes.values()) if changes else _ABSENT


_COLUMNS: dict[str, Callable[[Row, Row], str]] = {  # of a system's row, and of its phase
    "tok/s": lambda row, phase: f"{phase['tokens_per_s']:.2f}",
    "min - max": lambda row, phase: "{:.2f} - {:.2f}".format(*phase["tokens_per_s_range"]),
    "vs LoD": lambda row, phase: _over_reference(phase),
    "hits": lambda row, phase: _share(phase["hit_rate"]),
    "recall": lambda row, phase: _share(phase["recall"]),
    "covered": lambda row, phase: _share(phase["coverage"]),
    "read/token": lambda row, phase: format_bytes(phase["bytes_per_token"]),
    "wasted": lambda row, phase: format_bytes(phase["wasted_bytes_per_token"]),
    "stall": lambda row, phase: _share(phase["stall_share"]),
    "/bound": lambda row, phase: _times(phase["time_over_bound"]),
    "/Bélády": lambda row, phase: _times(phase.get("bytes_over_belady")),
}
