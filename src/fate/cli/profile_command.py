"""`fate profile`: how long this machine takes for a model's layers and experts, measured once and kept."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fate.cli import options
from fate.cli.output import byte_progress, err, out, print_json, print_table, print_words
from fate.core import Precision
from fate.units import format_bytes

if TYPE_CHECKING:
    from fate.plan.profile import Profile

_TOKENS = (1, 16, 64, 256)


def register(app: typer.Typer) -> None:
    app.command("profile", epilog="Example: fate profile assets/mini-moe")(profile)


def profile(
    model: options.Model,
    text: Annotated[
        Path | None, typer.Option(help="A text (UTF-8) like those to come. Default: a little prose and code.")
    ] = None,
    memory: options.Memory = None,
    experts: options.Experts = None,
    force: Annotated[bool, typer.Option("--force", help="Measure even where a profile holds.")] = False,
    json: options.Json = False,
) -> None:
    """Time MODEL's layers and the reads of its experts on this machine, and keep the result beside the store."""
    from fate.load import ensure_store
    from fate.plan.profile import read_profile, write_profile
    from fate.store.reader import StoreReader
    from fate.tools.evaluate import read_text

    options.check_limits(memory, experts)
    content = read_text(text) if text is not None else None
    with byte_progress() as bar:
        store = ensure_store(model, bar)
    reader = StoreReader(store)
    reader.close()
    found = read_profile(store, reader.header)
    result, path = found.profile, found.path
    if measured := force or result is None or path is None:
        if found.why_not and path is not None:
            print_words(err, f"the profile in {path} is not used, {found.why_not}: measuring again")
        result = _measure(store, content, memory, experts)
        path = write_profile(result, store)
    print_table(out, _table(result))
    speed = f"link {result.link_bytes_per_s / 1e9:.2f} GB/s; {result.machine}"
    print_words(out, f"{speed}; {'stored in' if measured else 'up to date:'} {path}", style="dim")
    if json:
        print_json({**result.to_json(), "measured": measured, "path": str(path)})


def _measure(store: Path, text: str | None, memory: str | None, experts: str | None) -> Profile:
    from fate.load import load, load_tokenizer
    from fate.tools.profiling import SAMPLE_TEXT, measure

    ids = load_tokenizer(store)(text or SAMPLE_TEXT, return_tensors="pt").input_ids[0]
    with err.status("loading") as status:
        loading = load(store, memory=memory, experts=experts, system="load-on-demand", on_plan=lambda *_: None)
        with loading as loaded:
            return measure(loaded, ids, status.update)


def _table(profile: Profile) -> Table:
    """A row for each run of layers that show the same."""
    tokens = [n for n in _TOKENS if n <= profile.tokens[-1]]
    compute = [f"{n} token{'s' if n > 1 else ''}" for n in tokens]
    table = Table("layers", *compute, "FULL", "INT2", "rho", "recall", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [(_cells(profile, layer, tokens), layer) for layer in range(len(profile.layers))]
    for cells, run in groupby(rows, key=lambda row: row[0]):
        layers = [layer for _, layer in run]
        span = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        table.add_row(span, *cells)
    return table


def _cells(profile: Profile, layer: int, tokens: list[int]) -> tuple[str, ...]:
    """rho: the read of a whole expert over the layer's compute for one token."""
    timing, of_layer = profile.timing(), profile.layers[layer]
    int2 = "-" if of_layer.int2_s is None else f"{_ms(of_layer.int2_s)} ({format_bytes(of_layer.int2_bytes or 0)})"
    return (
        *(_ms(timing.compute_s(layer, n)) for n in tokens),
        f"{_ms(timing.transfer_s(layer, Precision.FULL))} ({format_bytes(of_layer.full_bytes)})",
        int2,
        f"{of_layer.full_s / timing.compute_s(layer, 1):.2f}",
        "-" if of_layer.recall is None else f"{of_layer.recall:.0%}",
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
