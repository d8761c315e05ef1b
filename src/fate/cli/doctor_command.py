"""`fate doctor`: what this machine and installation give."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fate.cli import options
from fate.cli.output import err, print_facts, print_json


def register(app: typer.Typer) -> None:
    app.command("doctor", epilog="Example: fate doctor --path /data")(doctor)


def doctor(
    path: Annotated[Path, typer.Option(help="Directory whose disk is measured.")] = Path("."),
    json: options.Json = False,
) -> None:
    """Versions, cores, memory and disk read bandwidth, O_DIRECT, active kernels."""
    from fate.tools.diagnosis import diagnose

    with err.status("measuring memory and disk"):
        found = diagnose(path)
    print_facts(_readable(name, value) for name, value in found.items())
    if json:
        print_json(found)


def _readable(name: str, value: Any) -> tuple[str, str]:
    if name.endswith("_gb_per_s"):
        name, value = name.removesuffix("_gb_per_s"), f"{value:.1f} GB/s"
    return {"o_direct": "O_DIRECT"}.get(name, name.replace("_", " ")), str(value)
