"""The tables of a comparison's document: for each link, a row per budget and system, and the speed-ups; then the map of
hit rates.

The words are those of `core.StepStats`. vs LoD: median of paired ratios to load-on-demand. of perfect: hit rate over
that of fate-oracle, whose predictor is never wrong. /bound: time over the least in which this could be computed and
these bytes moved. /Bélády: bytes over the fewest any cache of this size needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from fate.bench.region import HIT_GOAL, PERFECT_GOAL
from fate.bench.summary import ORACLE, PHASES
from fate.units import format_bytes

Row = Mapping[str, Any]
_ABSENT = "-"
_REFERENCE = "load-on-demand"


def links(document: Row) -> list[str]:
    """Names of the links that cells were measured on, in order."""
    return list(dict.fromkeys(cell["link"] for cell in document["cells"]))


def link_title(document: Row, link: str) -> str:
    """qwen.fate over 12GB/s: 12.00 GB/s, ρ 0.45"""
    cell = _first_cell(document, link)
    return f"{document['store']} over {link}: {cell['bytes_per_s'] / 1e9:.3g} GB/s, ρ {cell['rho']:.2f}"


def _first_cell(document: Row, link: str) -> Row:
    cell: Row = next(cell for cell in document["cells"] if cell["link"] == link)
    return cell


def comparison_table(document: Row, link: str, phase: str) -> Table:
    """Rows: budget x system. phase: "decode" or "prefill"."""
    columns = dict(_COLUMNS)
    if ORACLE not in document["comparison"]["systems"]:
        del columns["of perfect"]
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
    """How many times as fast as each baseline: the median of paired ratios at each budget, and overlap's ceiling."""
    rows = [row for row in document["speedups"] if row["link"] == link]
    budgets = list(dict.fromkeys(cell["experts"] for cell in document["cells"] if cell["link"] == link))
    table = Table("", *budgets, "best", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        ratios = row["by_experts"]
        cells = [_ratio(ratios.get(budget), row["at_most"].get(budget)) for budget in budgets]
        words = f"{row['system']} vs {row['over']}, {row['phase']}"
        table.add_row(words, *cells, f"{ratios[row['best']]:.2f}x at {row['best']}")
    return table


def region_table(document: Row) -> Table:
    """Rows: links. Columns: budgets. Hit rate and, in brackets, the predicted link share; a star where it fits."""
    cells = document["hit_region"]["cells"]
    budgets = list(dict.fromkeys(cell["experts"] for cell in cells))
    table = Table("hit rate (link share)", *budgets, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for link in links(document):
        row = {cell["experts"]: cell for cell in cells if cell["link"] == link}
        rho = _first_cell(document, link)["rho"]
        name = link if link.startswith("ρ") else f"{link}, ρ {rho:.2f}"
        table.add_row(name, *(_region_cell(row[budget]) if budget in row else _ABSENT for budget in budgets))
    return table


def region_notes(document: Row) -> list[str]:
    """What the map shows, and what it says of the goals."""
    region = document["hit_region"]
    fitting = [cell for cell in region["cells"] if cell["fits"]]
    others = [cell for cell in region["cells"] if not cell["fits"] and cell["reached"] is not None]
    return [
        f"{region['system']} while decoding. Link share: bytes predicted for a layer / link bandwidth / compute time "
        "of a layer; predicted: needed, not cached, named before routing, or read in vain. *: it fits (<= 1).",
        f"At least {HIT_GOAL:.0%} hit in {_reached(fitting)} cells where it fits{_missing(fitting)}; at least "
        f"{PERFECT_GOAL:.0%} of a perfect predictor's hits in {_reached(others)} others{_missing(others)}.",
    ]


def notes(document: Row, link: str) -> list[str]:
    """What engines decided by measurement, and what else a reader of the table must know."""
    found = [note for note in (_link_bound(document, link, phase) for phase in PHASES) if note]
    if any(row["link"] == link and row["at_most"] for row in document["speedups"]):
        found.append(
            "speed-ups, at most: what a system that caches like the baseline could gain by overlap alone, (1 + m ρ) / "
            "max(1, u ρ) with the baseline's m misses and u uncached experts a layer (docs/overlap.md)"
        )
    if not document["compute"]["resident"]:
        found.append("not all experts fit in memory: the bound takes compute from a run less its stalls")
    for cell in document["cells"]:
        if cell["link"] == link:
            for name in document["comparison"]["systems"]:
                found += [f"{cell['experts']}, {name}: {note}" for note in cell["systems"][name]["notes"]]
    return found


def _link_bound(document: Row, link: str, phase: str) -> str | None:
    """Where the baseline that fetches on demand reads for longer than it computes."""
    if _REFERENCE not in document["comparison"]["systems"]:
        return None
    cells = [cell for cell in document["cells"] if cell["link"] == link]
    bound = [cell["experts"] for cell in cells if cell["systems"][_REFERENCE][phase]["link_bound"]]
    where = "no budget" if not bound else "every budget" if len(bound) == len(cells) else ", ".join(bound)
    return (
        f"{phase}, ρ {cells[0]['rho']:.2f}: {_REFERENCE} is link-bound (reads for longer than it computes) at {where}"
    )


def _region_cell(cell: Row) -> str:
    share = cell["predicted_link_share"]
    return f"{cell['hit_rate']:.1%} ({_times(share)}){'*' if cell['fits'] else ' '}"


def _reached(cells: list[Row]) -> str:
    return f"{sum(cell['reached'] for cell in cells)} of {len(cells)}"


def _missing(cells: list[Row]) -> str:
    missing = [f"{cell['link']} {cell['experts']}" for cell in cells if not cell["reached"]]
    return f" (not: {', '.join(missing)})" if missing else ""


def _ratio(ratio: float | None, at_most: float | None) -> str:
    if ratio is None:
        return _ABSENT
    return f"{ratio:.2f}x" if at_most is None else f"{ratio:.2f}x (at most {at_most:.2f})"


def _share(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.1%}"


def _times(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.2f}"


def _over_reference(phase: Row) -> str:
    ratio = phase["speedup_over"].get(_REFERENCE)
    return _ABSENT if ratio is None else f"{ratio['median']:.2f}x"


def _perplexity(row: Row) -> str:
    changes = row["perplexity_change"]
    return " / ".join(map(_change, changes.values())) if changes else _ABSENT


def _change(found: Row) -> str:
    error = found["standard_error"]
    return f"{found['change']:+.2%}" if error is None else f"{found['change']:+.2%} ± {error:.2%}"


_COLUMNS: dict[str, Callable[[Row, Row], str]] = {  # of a system's row, and of its phase
    "tok/s": lambda row, phase: f"{phase['tokens_per_s']:.2f}",
    "min - max": lambda row, phase: "{:.2f} - {:.2f}".format(*phase["tokens_per_s_range"]),
    "vs LoD": lambda row, phase: _over_reference(phase),
    "hit rate": lambda row, phase: _share(phase["hit_rate"]),
    "of perfect": lambda row, phase: _share(phase.get("hits_of_perfect")),
    "recall@k": lambda row, phase: _share(phase["recall"]),
    "coverage": lambda row, phase: _share(phase["coverage"]),
    "bytes/token": lambda row, phase: format_bytes(phase["bytes_per_token"]),
    "wasted": lambda row, phase: format_bytes(phase["wasted_bytes_per_token"]),
    "stall": lambda row, phase: _share(phase["stall_share"]),
    "/bound": lambda row, phase: _times(phase["time_over_bound"]),
    "/Bélády": lambda row, phase: _times(phase.get("bytes_over_belady")),
}
