"""`fate bench kernels`: each kernel alone, beside the machine's limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fate.cli import options
from fate.cli.output import byte_progress, out, print_json, print_table, print_words, step_progress
from fate.errors import UsageError


def register(app: typer.Typer) -> None:
    epilog = "Example: fate bench kernels --shapes qwen1.5-moe-a2.7b,mixtral-8x7b --tokens 1,16,512"
    app.command("kernels", epilog=epilog)(kernels_bench)


def kernels_bench(
    model: Annotated[
        str | None, typer.Argument(help="A store, checkpoint directory or hub id, for its shapes.")
    ] = None,
    shapes: Annotated[str | None, typer.Option(help="Known shapes, separated by commas, instead of MODEL.")] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "1,4,16,64,512",
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    instructions: Annotated[
        str | None, typer.Option(help="Instruction set, one of those `fate doctor` names.", show_default="the fastest")
    ] = None,
    json: options.Json = False,
) -> None:
    """Speed of each kernel alone by shape and precision, beside what this machine can do, and error against float64."""
    from fate.bench.kernel_shapes import known_shapes, store_shape
    from fate.bench.kernels import measure_kernels
    from fate.kernels import native
    from fate.load import ensure_store

    if (model is None) == (shapes is None):
        raise UsageError("give either MODEL or --shapes, such as --shapes qwen1.5-moe-a2.7b")
    counts = _counts(tokens)
    if model is not None:
        with byte_progress() as bar:
            wanted = [store_shape(Path(ensure_store(model, bar)))]
    else:
        wanted = known_shapes([name.strip() for name in (shapes or "").split(",") if name.strip()])
    with native.selected(instructions or native.active().name), step_progress() as progress:
        document = measure_kernels(wanted, counts, repeats, progress)
    for name, rows in document["shapes"].items():
        print_words(out, name, style="bold")
        print_table(out, _table(rows), fold=False)
        out.print()
    print_words(out, _limits(document), style="dim")
    if json:
        print_json(document)


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise UsageError(f"tokens {text!r} is not valid: give positive numbers separated by commas, as 1,16,512")
    return counts


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("kernel", "matrices", "precision"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tokens", "time", "GB/s", "GFLOP/s", "of bound", "error"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["kernel"],
            row["matrices"],
            row["precision"],
            str(row["tokens"]),
            f"{row['seconds'] * 1e3:.3f} ms",
            f"{row['gb_per_s']:.1f}",
            f"{row['gflop_per_s']:.0f}",
            f"{row['share_of_bound']:.0%}",
            f"{row['relative_error']:.2%}",
        )
    return table


def _limits(document: dict[str, Any]) -> str:
    limits, machine = document["limits"], document["environment"]
    return (
        f"this machine, {machine['threads']} threads: reads {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, int8 matrix "
        f"product {limits['int8_ops_per_s'] / 1e9:.0f} GFLOP/s; kernels {machine['kernels']}"
    )
