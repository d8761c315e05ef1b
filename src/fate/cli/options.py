"""Options that several commands share, defined once."""

from __future__ import annotations

from typing import Annotated

import typer

from fate.memory import parse_experts, parse_memory
from fate.systems import resolve_system, system_names

Model = Annotated[str, typer.Argument(help="A store, a checkpoint directory or a hub id.")]
Memory = Annotated[
    str | None,
    typer.Option(help="Peak resident memory of the whole process, e.g. 6GiB. Default: what is free less a margin."),
]
Experts = Annotated[
    str | None, typer.Option(help="At most this share (25%) or number of all experts in memory, whatever the budget.")
]
SystemName = Annotated[str, typer.Option("--system", help=f"One of: {', '.join(system_names())}.")]
MaxContext = Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and generation the plan covers.")]
Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No plan, no summary.")]


def check_limits(memory: str | None, experts: str | None, *systems: str) -> None:
    """Refuse what `fate.load` would, before the minutes that converting a checkpoint may take."""
    if memory is not None:
        parse_memory(memory)
    parse_experts(experts, total=1)
    for system in systems:
        resolve_system(system)
