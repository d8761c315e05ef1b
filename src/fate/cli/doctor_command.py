"""`fate doctor`: what this machine and installation give."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fate.cli import options
from fate.cli.output import err, out, print_json


def register(app: typer.Typer) -> None:
    app.command("doctor", epilog="Example: fate doctor --path /data")(doctor)


def doctor(
    path: Annotated[Path, typer.Option(help="Directory whose disk is measured.")] = Path("."),
    json: options.Json = False,
) -> None:
    """Versions, cores, memory and disk read bandwidth, O_DIRECT, active kernels."""
    from fate.diagnosis import diagnose

    with err.status("measuring memory and disk"):
        found = diagnose(path)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in found.items():
        table.add_row(name.replace("_", " "), f"{value:.1f}" if isinstance(value, float) else str(value))
    out.print(table)
    if json:
        print_json(found)
