"""`fate bench systems`: systems x budgets x links on prompts, with bounds, tables, plots and one JSON document."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fate.bench.comparison import DISK, EXPERTS, SETTLE_TOKENS, SYSTEMS, Comparison, Workload
from fate.cli import options
from fate.cli.output import byte_progress, err, out, print_json, print_table, print_words, step_progress
from fate.errors import UsageError

_STDOUT = Path("-")

Names = Annotated[str, typer.Option("--systems", help="Names, separated by commas.")]
Shares = Annotated[str, typer.Option("--experts", help="Shares of experts in memory, separated by commas.")]
Links = Annotated[str | None, typer.Option("--link", help="disk (default), speeds to emulate (12GB/s), or both.")]
Rhos = Annotated[str | None, typer.Option("--rho", help="Emulate links that take so many layers' time an expert.")]
Prompts = Annotated[list[Path], typer.Option(help="Text, or .jsonl with prompt, question or text; repeatable.")]
Recorded = Annotated[int, typer.Option(min=0, help="Other requests, run before measuring; 0: caches are cold.")]
Settling = Annotated[int, typer.Option(min=0, help="Decode so many of their tokens at least: prefetching settles.")]
Judged = Annotated[list[Path] | None, typer.Option(help="Texts that lossy systems are judged on; repeatable.")]
Json = Annotated[Path | None, typer.Option(help="File for the result; - for one line on standard output.")]
Resume = Annotated[Path | None, typer.Option(help="JSON of one that was cut short: go on with it, and write it there.")]
Plots = Annotated[Path | None, typer.Option(help="Directory for PNG files; needs matplotlib.")]


def register(app: typer.Typer) -> None:
    epilog = (
        "Example: fate bench systems qwen.fate --prompts gsm8k.jsonl --experts 25%,50% --link disk,12GB/s "
        "--json result.json --plots plots"
    )
    app.command("systems", epilog=epilog)(systems_bench)


def systems_bench(
    model: options.Model,
    prompts: Prompts,
    systems: Names = SYSTEMS,
    experts: Shares = EXPERTS,
    link: Links = None,
    rho: Rhos = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each system in each cell.")] = 3,
    record_prompts: Recorded = 4,
    settle_tokens: Settling = SETTLE_TOKENS,
    perplexity_text: Judged = None,
    perplexity_tokens: Annotated[int, typer.Option(min=2, help="Only the first so many tokens of each text.")] = 512,
    json: Json = None,
    resume: Resume = None,
    plots: Plots = None,
) -> None:
    """Systems x budgets x links on given prompts: A B A B, paired ratios, and how far each is from its bound."""
    from fate.bench.prompts import make_requests, read_prompts
    from fate.bench.quality import make_quality
    from fate.bench.report import document
    from fate.bench.resume import read_comparison
    from fate.bench.resume import resume as resumed
    from fate.bench.systems import SystemsBench
    from fate.load import ensure_store, load_tokenizer
    from fate.tools.evaluate import read_text

    links = _split(link) if link is not None else () if rho is not None else (DISK,)
    rhos = _numbers(rho) if rho is not None else ()
    timelines = plots is not None
    comparison = Comparison(_split(systems), _split(experts), links, rhos, repeats, settle_tokens, timelines)
    saved = read_comparison(resume) if resume is not None else None
    file = resume if json in (None, _STDOUT) else json
    _check_outputs(file, plots)
    files = [read_prompts(prompt_file) for prompt_file in prompts]
    texts = {text_file.name: read_text(text_file) for text_file in perplexity_text or ()}
    with byte_progress() as bar:
        store = ensure_store(model, bar)
    encode = partial(load_tokenizer(store).encode, add_special_tokens=False)
    workload = Workload(*make_requests(files, encode, prompt_tokens, new_tokens, record_prompts))
    quality = make_quality(texts, encode, prompt_tokens, perplexity_tokens)
    measured = None
    if resume is not None and saved is not None:
        measured = resumed(resume, saved, _fingerprint(store), comparison, workload, quality)
    bench = SystemsBench(comparison, workload, quality, measured)
    if saved is not None and bench.complete:  # nothing to do but to show it
        _save(saved, file)
        _report(saved, json, plots)
        return

    def result() -> dict[str, Any]:
        return document(store, comparison, workload, bench.measured, quality)

    try:
        with step_progress() as progress:
            bench.run(store, progress, lambda: _save(result(), file))
    finally:  # after Ctrl-C or a failure too: what is finished counts
        if bench.measured.cells:
            _report(result(), json, plots)


def _save(result: dict[str, Any], file: Path | None) -> None:
    from fate.bench.report import write_json

    if file is not None:
        write_json(result, file)


def _fingerprint(store: Path) -> str:
    from fate.store.reader import StoreReader

    with closing(StoreReader(store)) as reader:
        return reader.header.fingerprint


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _split(text))
    except ValueError:
        raise UsageError(f"rho {text!r} is not valid: give positive numbers separated by commas, as 0.5,1,2") from None


def _check_outputs(file: Path | None, plots: Path | None) -> None:
    """Refuse now what would lose the results of an hour."""
    from fate.bench.plots import check_plots

    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise UsageError(f"--json {file} cannot be written: give a file in a directory that exists, or -")
    if plots is not None:
        check_plots()
        plots.mkdir(parents=True, exist_ok=True)


def _report(result: dict[str, Any], json: Path | None, plots: Path | None) -> None:
    """Tables on standard output, plots where they were asked for."""
    from fate.bench import tables
    from fate.bench.plots import draw
    from fate.bench.summary import PHASES

    for link in tables.links(result):
        print_words(out, tables.link_title(result, link), style="bold")
        for phase in PHASES:
            print_table(out, tables.comparison_table(result, link, phase), fold=False)
            out.print()
        if result["speedups"]:
            print_table(out, tables.speedup_table(result, link), fold=False)
        for note in tables.notes(result, link):
            print_words(out, note, style="dim")
        out.print()
    if result["hit_region"] is not None:
        print_table(out, tables.region_table(result), fold=False)
        for note in tables.region_notes(result):
            print_words(out, note, style="dim")
    if plots is not None:
        for path in draw(result, plots):
            print_words(err, str(path), style="dim")
    if json == _STDOUT:
        print_json(result)
