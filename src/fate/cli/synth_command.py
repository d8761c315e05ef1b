"""`fate synth`: a full-size store or checkpoint of random weights, to measure where real weights are not at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fate.cli.output import byte_progress, directory_bytes, err
from fate.errors import UsageError
from fate.tools.synth.shapes import MODELS
from fate.units import format_bytes


def register(app: typer.Typer) -> None:
    app.command("synth", epilog="Example: fate synth qwen1.5-moe-a2.7b qwen.fate --dense-bits 4")(synth)


def synth(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(MODELS)}.")],
    output: Annotated[Path, typer.Argument(metavar="OUT")],
    routing: Annotated[
        str | None,
        typer.Option(
            help="real: experts recur and the next gate foresees them about as in trained models. "
            "uniform: every token has experts of its own, the hard case for a cache. "
            "[default: real, where NAME has it]"
        ),
    ] = None,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint", help="Write a bfloat16 checkpoint as the hub has them, to convert.")
    ] = False,
    dense_bits: Annotated[int | None, typer.Option(help="4, 8 or 16, of a store. [default: 4]")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    num_layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers than the original has.")] = None,
) -> None:
    """Write a store with the shapes of NAME and random weights. Its text is noise: feed it a fixed sequence."""
    from fate.tools.synth.checkpoint import synth_checkpoint
    from fate.tools.synth.store import synth as write_store

    if checkpoint and dense_bits is not None:
        raise UsageError(f"--dense-bits {dense_bits} is of a store, --checkpoint has 16 bits throughout: drop one")
    with byte_progress("writing") as bar:
        if checkpoint:
            written = synth_checkpoint(name, output, seed, num_layers, progress=bar, routing=routing)
        else:
            written = write_store(
                name, output, seed, 4 if dense_bits is None else dense_bits, num_layers, progress=bar, routing=routing
            )
    err.print(f"{written}: {format_bytes(directory_bytes(written))} written")
