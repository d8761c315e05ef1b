"""`fate convert`: a checkpoint becomes a store."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fate.cli import options
from fate.cli.output import byte_progress, directory_bytes, err, out
from fate.units import format_bytes


def register(app: typer.Typer) -> None:
    app.command("convert", epilog="Example: fate convert assets/mini-moe mini-moe.fate --dense-bits 8")(convert)


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint directory, a GGUF file or a hub id.")],
    output: Annotated[Path | None, typer.Argument(metavar="OUT", help="The store. Default: SRC's name + .fate")] = None,
    expert_bits: Annotated[int, typer.Option(help="4 (nested INT4/INT2), 16 or 32 (raw).")] = 4,
    dense_bits: Annotated[int, typer.Option(help="4, 8 or 16.")] = 8,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Convert a Hugging Face MoE checkpoint into a store, one expert at a time; safe to stop and resume."""
    from fate.convert import convert as convert_checkpoint
    from fate.convert.checkpoint import resolve_source

    path = resolve_source(source)
    target = output or Path(f"{_name(source, path)}.fate")
    try:
        with byte_progress() as bar:
            store = convert_checkpoint(
                path,
                target,
                expert_bits=expert_bits,
                dense_bits=dense_bits,
                force=force,
                progress=bar,
                trust_remote_code=trust_remote_code,
            )
    except KeyboardInterrupt:
        err.print("stopped: the same command goes on from here")
        raise
    err.print(f"{store}: {format_bytes(directory_bytes(store))}; try it with")
    out.print(f'fate run {shlex.quote(str(store))} "Once upon a time"')


def _name(source: str, path: Path) -> str:
    """A directory's own name, whatever way it was written; of a hub id the last part (its snapshot is a hash)."""
    return path.resolve().name if Path(source).expanduser().is_dir() else source.rpartition("/")[2]
