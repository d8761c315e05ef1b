"""Plots of a comparison's document: speed by budget, hit rate by layer, one decoded token in time, and the map of hit
rates over links and budgets.

matplotlib is an optional dependency; it draws into files only. A system has the same colour and marker everywhere, from
the palette of Okabe and Ito, which is told apart with any colour vision.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fate.bench.tables import link_title, links
from fate.errors import MissingPackageError

Row = Mapping[str, Any]

STYLES = {
    "load-on-demand-uncached": ("#999999", "x"),
    "load-on-demand": ("#000000", "s"),
    "eap": ("#E69F00", "^"),
    "cross-layer": ("#56B4E9", "v"),
    "fate-published": ("#0072B2", "P"),
    "fate-oracle": ("#009E73", "X"),
    "fate": ("#D55E00", "o"),
    "fate-hybrid": ("#CC79A7", "D"),
}
_OTHERS = (("#F0E442", "*"), ("#44AA99", "d"), ("#332288", "p"), ("#882255", "h"))
_PHASES = (("decode", "decoding, tokens/s"), ("prefill", "prefill, tokens/s"))
_UNCACHED = "load-on-demand-uncached"
_COMPUTE, _STALL, _PREDICT, _DEMAND, _PREFETCH = "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#0072B2"
_RC: Any = {
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def check_plots() -> None:
    """Raises MissingPackageError where matplotlib is not installed."""
    try:
        import matplotlib as matplotlib
    except ImportError:
        raise MissingPackageError("matplotlib", "plots") from None


def draw(document: Row, folder: Path) -> list[Path]:
    """Write PNG files into `folder` (made if missing); returns their paths. Raises OSError, MissingPackageError."""
    check_plots()
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(_RC):
        written.append(_save(_speed(document), folder / "speed.png"))
        for link in links(document):
            cells = [cell for cell in document["cells"] if cell["link"] == link]
            name = re.sub(r"[^A-Za-z0-9.]+", "-", link.replace("ρ", "rho")).strip("-")
            written.append(_save(_hit_rates(document, link, cells), folder / f"hit-rate-{name}.png"))
            for cell in cells:
                if cell["timelines"]:
                    written.append(_save(_timelines(document, cell), folder / f"timeline-{name}.png"))
        if document["hit_region"] is not None:
            written.append(_save(_hit_region(document), folder / "hit-region.png"))
    return written


def style(system: str, systems: Iterable[str]) -> tuple[str, str]:
    """(colour, marker): fixed for the known ones, by order among the others."""
    if system in STYLES:
        return STYLES[system]
    others = [name for name in systems if name not in STYLES]
    return _OTHERS[others.index(system) % len(_OTHERS)]


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure that no window knows of, and its axes [rows, columns], which share what a row and a column measure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=True, sharey="row")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight")
    return path


def _speed(document: Row) -> Any:
    """Rows: decode, prefill. Columns: links. Medians, with bars from the slowest repeat to the fastest."""
    names, systems = links(document), document["comparison"]["systems"]
    figure, axes = _figure(2, len(names), max(6.4, 4.6 * len(names)), 7.2)
    for column, link in enumerate(names):
        cells = sorted((cell for cell in document["cells"] if cell["link"] == link), key=lambda cell: cell["share"])
        shares = [100 * cell["share"] for cell in cells]
        axes[0][column].set_title(link_title(document, link), fontsize=10)
        axes[1][column].set_xlabel("experts in memory, %")
        for row, (phase, _) in enumerate(_PHASES):
            axis = axes[row][column]
            for system in systems:
                _curve(axis, shares, [cell["systems"][system][phase] for cell in cells], system, systems)
            limit = 1 / document["compute"][f"{phase}_s_per_token"]
            axis.axhline(limit, color="#444444", linestyle="--", linewidth=1, label="all in memory")
            axis.set_ylim(bottom=0)
    for row, (_, label) in enumerate(_PHASES):
        axes[row][0].set_ylabel(label)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _curve(axis: Any, shares: list[float], rows: list[Row], system: str, systems: Iterable[str]) -> None:
    colour, marker = style(system, systems)
    medians = [row["tokens_per_s"] for row in rows]
    below = [row["tokens_per_s"] - row["tokens_per_s_range"][0] for row in rows]
    above = [row["tokens_per_s_range"][1] - row["tokens_per_s"] for row in rows]
    bold = {"linewidth": 2.2, "zorder": 3} if system.startswith("fate") else {"linewidth": 1.3}
    axis.errorbar(
        shares, medians, yerr=[below, above], label=system, color=colour, marker=marker, markersize=5, capsize=2, **bold
    )


def _hit_rates(document: Row, link: str, cells: list[Row]) -> Any:
    """Columns: budgets. The share of experts found in memory while decoding, layer by layer."""
    systems = document["comparison"]["systems"]
    figure, axes = _figure(1, len(cells), max(6.4, 3.4 * len(cells)), 3.8)
    for axis, cell in zip(axes[0], cells):
        for system in systems:
            rates = cell["systems"][system]["layer_hit_rate"]["decode"]
            colour, marker = style(system, systems)
            bold = 2.2 if system.startswith("fate") else 1.3
            axis.plot([100 * r for r in rates], color=colour, marker=marker, markersize=3, linewidth=bold, label=system)
        axis.set_title(f"{cell['experts']} of experts in memory", fontsize=10)
        axis.set_xlabel("MoE layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(-3, 103)
    axes[0][0].set_ylabel("hit rate while decoding, %")
    figure.suptitle(link_title(document, link), fontsize=11)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def _hit_region(document: Row) -> Any:
    """Rows: links by rho, columns: budgets. Colour: hit rate. Framed: what was predicted fits the idle link."""
    from matplotlib.patches import Rectangle

    region = document["hit_region"]
    cells = region["cells"]
    names = sorted(links(document), key=lambda link: next(cell["rho"] for cell in cells if cell["link"] == link))
    budgets = sorted({(cell["share"], cell["experts"]) for cell in cells})
    figure, axes = _figure(1, 1, max(6.4, 2.6 + 1.3 * len(budgets)), 2.2 + 0.75 * len(names))
    axis = axes[0][0]
    for cell in cells:
        column, row = budgets.index((cell["share"], cell["experts"])), names.index(cell["link"])
        axis.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=_shade(cell["hit_rate"]), edgecolor="white")
        )
        share = cell["predicted_link_share"]
        words = f"{cell['hit_rate']:.1%}\nlink {share:.2f}" if share is not None else f"{cell['hit_rate']:.1%}"
        axis.text(column, row, words, ha="center", va="center", fontsize=10)
        if cell["fits"]:
            corner = (column - 0.46, row - 0.46)
            axis.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="#000000", linewidth=2.5))
    rhos = {cell["link"]: cell["rho"] for cell in cells}
    axis.set_yticks(range(len(names)), [n if n.startswith("ρ") else f"{n}\nρ {rhos[n]:.2f}" for n in names])
    axis.set_xticks(range(len(budgets)), [experts for _, experts in budgets])
    axis.set_xlim(-0.5, len(budgets) - 0.5)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel(
        "experts in memory\nframed: the predicted bytes of a layer fit the link in its compute time (link ≤ 1)"
    )
    axis.grid(False)
    axis.set_title(f"{document['store']}: hit rate of {region['system']} while decoding", fontsize=11)
    return figure


def _shade(hit_rate: float) -> tuple[float, float, float]:
    """White at 80% and below, the darkest at 100%, where text is still read on it."""
    strength = max(hit_rate - 0.8, 0.0) / 0.2
    return (1 - 0.65 * strength, 1 - 0.30 * strength, 1 - 0.45 * strength)


def _timelines(document: Row, cell: Row) -> Any:
    """One panel a system, all with the same time axis: what the layers do above, what the link carries below. The axis
    ends with the slowest that caches: beside one that does not, the others could not be read."""
    from matplotlib.patches import Patch

    timelines = {name: cell["timelines"][name] for name in document["comparison"]["systems"]}
    figure, axes = _figure(len(timelines), 1, 12, 1.0 + 1.35 * len(timelines))
    caching = [timeline["seconds"] for system, timeline in timelines.items() if system != _UNCACHED]
    end_s = 1.02 * max(caching or [timeline["seconds"] for timeline in timelines.values()])
    for (system, timeline), axis in zip(timelines.items(), axes[:, 0]):
        _lanes(axis, timeline)
        beyond = " (goes on to the right)" if timeline["seconds"] > end_s else ""
        axis.set_title(f"{system}: {1000 * timeline['seconds']:.1f} ms{beyond}", fontsize=10, loc="left")
    axes[0][0].set_xlim(0, 1000 * end_s)
    axes[-1][0].set_xlabel("ms since the token began (thin lines: a layer's routing is known; thick: the token's end)")
    figure.suptitle(f"One decoded token, {link_title(document, cell['link'])}, {cell['experts']} of experts in memory")
    legend = [("experts compute", _COMPUTE), ("stall", _STALL), ("prediction", _PREDICT)]
    legend += [("read on demand", _DEMAND), ("prefetch", _PREFETCH)]
    figure.legend(handles=[Patch(color=c, label=name) for name, c in legend], loc="outside lower center", ncols=5)
    return figure


def _lanes(axis: Any, timeline: Row) -> None:
    kinds = {"compute": (1.0, _COMPUTE), "stall": (1.0, _STALL), "predict": (1.0, _PREDICT)}
    kinds |= {"demand": (0.0, _DEMAND), "prefetch": (0.0, _PREFETCH)}
    for kind, (lane, colour) in kinds.items():
        events = [event for event in timeline["events"] if event["kind"] == kind]
        spans = [(1000 * event["start_s"], 1000 * (event["end_s"] - event["start_s"])) for event in events]
        axis.broken_barh(spans, (lane - 0.38, 0.76), facecolors=colour, edgecolor="white", linewidth=0.3)
    for event in timeline["events"]:
        if event["kind"] == "layer":
            axis.axvline(1000 * event["start_s"], color="#444444", linewidth=0.6, alpha=0.5)
    axis.axvline(1000 * timeline["seconds"], color="#000000", linewidth=2)
    axis.set_yticks([0, 1], ["link", "layers"])
    axis.set_ylim(-0.5, 1.5)
    axis.grid(False)
