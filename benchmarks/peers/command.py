"""`python -m benchmarks.peers`: Fate beside llama.cpp on the same weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fate.cli import options
from fate.cli.app import run_app
from fate.cli.output import byte_progress, err, out, print_json, print_table, print_words, step_progress
from fate.errors import UnknownNameError, UsageError
from fate.units import parse_memory

FORMS = ("q4_1", "q4_0")


_EPILOG = (
    "Example: python -m benchmarks.peers qwen.fate --peer-python peer/bin/python --budgets resident,4GiB "
    "--json peers.json"
)


def main(argv: list[str] | None = None) -> None:
    """Exits as `fate` does: 0, 1 (failure), 2 (usage) or 130 (interrupted)."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=_EPILOG)(peers_bench)
    run_app(lambda: app, argv, "python -m benchmarks.peers")


def peers_bench(
    model: options.Model,
    peer_python: Annotated[
        str | None, typer.Option(help="The Python that has llama-cpp-python. Default: the one that runs this.")
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="resident, and memory limits for each process; commas between.")
    ] = "resident,6GiB,4GiB,3GiB",
    threads: Annotated[str | None, typer.Option(help="Numbers of threads the peer tries. Default: all cores.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 2,
    decode_tokens: Annotated[int, typer.Option(min=1)] = 32,
    forms: Annotated[
        str, typer.Option(help="GGUF forms the peer runs: q4_1 holds our INT4 exactly, q4_0 is its fastest.")
    ] = ",".join(FORMS),
    text: Annotated[Path | None, typer.Option(help="The text whose tokens are fed. Default: one of ours.")] = None,
    files: Annotated[Path | None, typer.Option(help="Where the GGUF files are written. Default: beside MODEL.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for the result; - for one line on standard output.")] = None,
) -> None:
    """Fate and llama.cpp on the same weights, tokens and memory limits, in turn; neither is quoted, both are run."""
    from benchmarks.peers.comparison import RESIDENT, Comparison, Settings, peer_version
    from benchmarks.peers.gguf_file import load_gguf, write_gguf
    from benchmarks.peers.summary import document
    from fate.bench.report import write_json
    from fate.load import ensure_store
    from fate.tools.diagnosis import memory_read_gb_per_s

    names = tuple(name.strip() for name in budgets.split(",") if name.strip())
    for name in names:
        if name != RESIDENT:
            parse_memory(name)
    if not names:
        raise UsageError("no budget was named: give --budgets resident,4GiB")
    chosen = tuple(form.strip() for form in forms.split(","))
    if unknown := next((form for form in chosen if form not in FORMS), None):
        raise UnknownNameError("GGUF form", unknown, FORMS)
    settings = Settings(names, _threads(threads), repeats, decode_tokens=decode_tokens)
    python = peer_python or sys.executable
    version = peer_version(python)
    load_gguf()
    with byte_progress() as bar:
        store = Path(ensure_store(model, bar))
    ids = _ids(store, text, settings.max_context)
    with byte_progress("writing") as bar:
        folder = files or store.parent
        folder.mkdir(parents=True, exist_ok=True)
        written = [write_gguf(store, folder / f"{store.stem}.{form}.gguf", form, bar) for form in chosen]
    comparison = Comparison(store, written, python, ids, settings)
    with err.status("measuring the memory"):
        read_bytes_per_s = memory_read_gb_per_s() * 1e9
    try:
        with step_progress() as progress:
            comparison.run(progress)
    finally:  # after Ctrl-C too: what is finished counts
        read_bytes_per_s = max(read_bytes_per_s, memory_read_gb_per_s() * 1e9)  # a busy machine reads less
        result = document(store, written, version, settings, comparison.results, read_bytes_per_s)
        _show(result)
        if json == Path("-"):
            print_json(result)
        elif json is not None:
            write_json(result, json)


def _threads(text: str | None) -> tuple[int, ...]:
    if text is None:
        return (os.cpu_count() or 1,)
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise UsageError(f"threads {text!r} is not valid: give positive numbers separated by commas, as 2,1")
    return counts


def _ids(store: Path, text: Path | None, needed: int) -> list[int]:
    from fate.load import load_tokenizer
    from fate.tools.evaluate import read_text
    from fate.tools.profiling import SAMPLE_TEXT

    words = read_text(text) if text is not None else SAMPLE_TEXT * 3
    ids: list[int] = load_tokenizer(store).encode(words, add_special_tokens=False)
    if len(ids) < needed:
        raise UsageError(f"the text has {len(ids)} tokens, {needed} are needed: give a longer text")
    return ids[:needed]


def _show(result: dict[str, Any]) -> None:
    engines = list(dict.fromkeys(name for row in result["rows"] for name in row["engines"]))
    table = Table(box=None, pad_edge=False)
    for heading in ("budget", "", "unit"):
        table.add_column(heading, no_wrap=True)
    for heading in (*engines, "times as fast"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        cells = [_cell(row["engines"].get(name)) for name in engines]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        table.add_row(row["budget"], row["what"], row["unit"], *cells, ratio)
    print_table(out, table, fold=False)
    for note in _notes(result):
        print_words(out, note, style="dim")


def _cell(entry: dict[str, Any] | None) -> str:
    return "-" if entry is None else f"{entry['median']:.2f} ({entry['range'][0]:.2f} - {entry['range'][1]:.2f})"


def _notes(result: dict[str, Any]) -> list[str]:
    notes = [
        f"llama.cpp of llama-cpp-python {result['peer']['llama_cpp_python']}; ratios are to its best column",
        f"memory reads {result['read_bytes_per_s'] / 1e9:.1f} GB/s here, which bounds decoding at "
        f"{result['bound_tokens_per_s']:.1f} tokens/s of {result['weight_bytes_per_token'] / 1e9:.2f} GB",
    ]
    for form, file in result["files"].items():
        exact = "the store's weights" if form == "q4_1" else "quantized again from them"
        changed = f", none changed by more than {file['rounding']:.2g} of its group's range" if form == "q4_1" else ""
        notes.append(f"{form}: {exact}{changed}")
    for name, alike in result["agreement"].items():
        notes.append(
            f"logits of the prompt, fate and {name}: correlation {alike['correlation']:.4f}, the same top token at "
            f"{alike['same_top_token']:.0%} of positions"
        )
    notes += [f"{failed['engine']} at {failed['budget']}: {failed['why']}" for failed in result["failed"]]
    return notes
