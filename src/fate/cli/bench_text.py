"""`fate bench text`: speed on one text inside a memory budget, systems interleaved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fate.cli import options
from fate.cli.output import byte_progress, err, out, print_json, print_table, print_words
from fate.errors import UsageError
from fate.units import format_bytes


def register(app: typer.Typer) -> None:
    epilog = "Example: fate bench text qwen.fate --text story.txt --memory 4GiB --json"
    app.command("text", epilog=epilog)(text_bench)


def text_bench(
    model: options.Model,
    text: Annotated[Path, typer.Option(help="The text whose tokens are fed (UTF-8).")],
    systems: Annotated[str, typer.Option(help="Names, separated by commas.")] = "load-on-demand,cross-layer",
    memory: options.Memory = None,
    experts: options.Experts = None,
    max_context: options.MaxContext = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    json: options.Json = False,
) -> None:
    """Prefill and decode speed of MODEL on a given text: A B A B, median and spread, with the disk's limit beside."""
    from fate.bench.fixed_text import Workload, measure
    from fate.load import ensure_store
    from fate.systems import resolve_system
    from fate.tools.diagnosis import disk_read_gb_per_s
    from fate.tools.evaluate import read_text

    options.check_limits(memory, experts)
    names = [resolve_system(name.strip()).name for name in systems.split(",") if name.strip()]
    if not names:
        raise UsageError("no system was named: give --systems load-on-demand,cross-layer")
    workload = Workload(read_text(text), prompt_tokens, new_tokens, repeats)
    with byte_progress() as bar:
        store = ensure_store(model, bar)
    with err.status("loading") as status:
        result = measure(store, names, workload, status.update, memory=memory, experts=experts, max_context=max_context)
        status.update("measuring the disk")
        _, disk = disk_read_gb_per_s(store.parent)
    result["disk_read_gb_per_s"] = disk
    print_table(out, _table(result))
    print_words(
        out,
        f"disk reads {disk:.2f} GB/s here; peak resident {format_bytes(result['peak_resident_bytes'])}",
        style="dim",
    )
    if json:
        print_json(result)


def _table(result: dict[str, Any]) -> Table:
    """A column for each system."""
    table = Table("", *result["systems"], box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cell in _CELLS.items():
        table.add_row(name, *(cell(row) for row in result["systems"].values()))
    return table


_CELLS: dict[str, Callable[[dict[str, Any]], str]] = {
    "slots / experts": lambda row: f"{row['slots']}/{row['experts']}",
    "prefill tok/s": lambda row: f"{row['prefill_tokens_per_s']:.1f}",
    "decode tok/s": lambda row: f"{row['decode_tokens_per_s']:.2f}",
    "range": lambda row: "{:.2f} - {:.2f}".format(*row["decode_tokens_per_s_range"]),
    "hits": lambda row: f"{row['hit_rate']:.1%}",
    "read per token": lambda row: format_bytes(row["bytes_per_token"]),
    "link": lambda row: f"{row['link_bytes_per_s'] / 1e9:.2f} GB/s",
    "stall": lambda row: f"{row['stall_share']:.1%}",
}
