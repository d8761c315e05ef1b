"""`fate synth`: a full-size store of random weights, to measure speed and memory where real weights are not at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fate.cli.output import byte_progress, directory_bytes, err
from fate.memory import format_bytes


def register(app: typer.Typer) -> None:
    app.command("synth", epilog="Example: fate synth qwen1.5-moe-a2.7b qwen.fate --dense-bits 4")(synth)


def synth(
    name: Annotated[str, typer.Argument(help="qwen1.5-moe-a2.7b or deepseek-moe-16b.")],
    output: Annotated[Path, typer.Argument(metavar="OUT")],
    routing: Annotated[
        str,
        typer.Option(
            help="real: experts recur and the next gate foresees them about as in trained models. "
            "uniform: every token has experts of its own, the hard case for a cache."
        ),
    ] = "real",
    dense_bits: Annotated[int, typer.Option(help="4, 8 or 16.")] = 4,
    seed: Annotated[int, typer.Option()] = 0,
    num_layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers than the original has.")] = None,
) -> None:
    """Write a store with the shapes of NAME and random weights. Its text is noise: feed it a fixed sequence."""
    from fate.synth import synth as write_store

    with byte_progress("writing") as bar:
        store = write_store(name, output, seed, dense_bits, num_layers, progress=bar, routing=routing)
    err.print(f"{store}: {format_bytes(directory_bytes(store))} written")
