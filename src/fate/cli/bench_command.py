"""`fate bench`: the benchmarks. `text` is one text inside a memory budget; `systems` compares systems over
budgets; `kernels` measures each kernel alone."""

from __future__ import annotations

import typer

from fate.cli import bench_kernels, bench_systems, bench_text


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        no_args_is_help=True,
        help="Measure speed: of a text inside a budget, of systems against each other, of kernels alone.",
        epilog="Example: fate bench systems qwen.fate --prompts gsm8k.jsonl --experts 25%,50% --link 12GB/s",
    )
    bench_text.register(group)
    bench_systems.register(group)
    bench_kernels.register(group)
    app.add_typer(group, name="bench")
