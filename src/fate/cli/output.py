"""What the commands show: two consoles, the memory plan as a table, byte progress with rate and ETA, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from fate.memory import MemoryPlan, format_bytes
from fate.systems import System

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True, soft_wrap=True)


def print_json(document: dict[str, Any]) -> None:
    """One JSON object on one line of standard output: always a command's last line."""
    print(json.dumps(document, sort_keys=True), flush=True)


def print_plan(plan: MemoryPlan, system: System) -> None:
    """The plan, on standard error, before anything is allocated."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for name, size, note in plan.rows():
        table.add_row(name, format_bytes(size), note)
    table.add_row("[bold]total[/]", f"[bold]{format_bytes(plan.total)}[/]", f"of {format_bytes(plan.budget)}")
    err.print(f"[bold]system {system.name}[/]" + ("" if system.exact else " [yellow](lossy)[/]"))
    err.print(table)


@contextmanager
def token_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error driven by callback(done_tokens, total_tokens)."""
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total} tokens"), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("tokens", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def byte_progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error driven by callback(done_bytes, total_bytes, what)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def update(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        yield update
