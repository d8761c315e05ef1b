"""What the commands show: two consoles, tables, progress bars with rate and ETA, errors, JSON.

Bars and colours are for terminals. Anywhere else a table is a line a row, however long, and a bar is nothing.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

# What is printed holds paths and users' words: brackets and colons in them are no markup.
out = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
err = Console(markup=False, emoji=False, highlight=False, soft_wrap=True, stderr=True)

_UNLIMITED = 10_000  # columns


def directory_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def print_error(message: str) -> None:
    """One line on standard error, whatever the message holds."""
    err.print(Text.assemble(("error:", "bold red"), " ", " ".join(message.split())))


def print_words(console: Console, text: str, style: str = "") -> None:
    """A sentence: broken between words on a terminal, one line elsewhere."""
    console.print(text, style=style, soft_wrap=not console.is_terminal)


def print_json(document: dict[str, Any]) -> None:
    """One JSON object on one line of standard output: always a command's last line."""
    print(json.dumps(document, sort_keys=True), flush=True)


def print_table(console: Console, table: Table, *, fold: bool = True) -> None:
    """Folded to the width of a terminal; elsewhere, and if `fold` is false, a line a row without padding at its end."""
    if console.is_terminal and fold:
        console.print(table, soft_wrap=False)
        return
    page = Console(file=io.StringIO(), width=_UNLIMITED, color_system=None, markup=False, emoji=False, highlight=False)
    with page.capture() as captured:
        page.print(table)
    for line in captured.get().splitlines():
        console.print(line.rstrip())


def print_facts(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values in two columns on standard output."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    print_table(out, table)


@contextmanager
def token_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error driven by callback(done_tokens, total_tokens)."""
    with _bar(TextColumn("{task.completed}/{task.total} tokens"), TimeRemainingColumn()) as update:
        yield lambda done, total: update(done, total, "")


@contextmanager
def byte_progress(verb: str = "converting") -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error driven by callback(done_bytes, total_bytes, what)."""
    columns = (DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with _bar(*columns) as update:
        yield lambda done, total, what: update(done, total, f"{verb} {_part(what):<19}")


@contextmanager
def step_progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error driven by callback(done_steps, total_steps, what); steps may take minutes each."""
    start = time.monotonic()

    def words(done: int, total: int, what: str) -> str:
        if not done:
            return what
        step_s = (time.monotonic() - start) / done
        return f"{what} · {step_s:.0f} s a step · {max(step_s * (total - done) / 60, 1):.0f} min left"

    with _bar(TextColumn("{task.completed}/{task.total}")) as update:
        yield lambda done, total, what: update(done, total, words(done, total, what))


def _part(what: str) -> str:
    """What is being written, in few and steady words: a bar that moves sideways cannot be read."""
    return what if what.startswith("layer ") else "dense weights"


@contextmanager
def _bar(*columns: ProgressColumn) -> Iterator[Callable[[int, int, str], None]]:
    """A bar that appears with the first call and is gone at the end; nothing where no one watches."""
    words = TextColumn("{task.description}", style="dim")
    progress = Progress(words, BarColumn(None), *columns, console=err, transient=True, disable=not err.is_terminal)
    task = progress.add_task("", start=False)

    def update(done: int, total: int, description: str) -> None:
        if not progress.live.is_started:
            progress.start()
            progress.start_task(task)
            progress.update(task, completed=done)  # what an earlier run wrote does not count as this one's speed
        progress.update(task, completed=done, total=total, description=description)

    try:
        yield update
    finally:
        progress.stop()
