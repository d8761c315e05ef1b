"""`fate plan`: what a model will take and give on this machine, before it is downloaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fate.cli import options
from fate.cli.output import err, out, print_facts, print_json, print_table
from fate.errors import CannotFitError
from fate.units import format_bytes, format_memory_argument, parse_memory


def register(app: typer.Typer) -> None:
    app.command("plan", epilog="Example: fate plan Qwen/Qwen3-30B-A3B --memory 8GiB --memory 16GiB")(plan)


def plan(
    model: Annotated[str, typer.Argument(help="A store, a checkpoint directory, a hub id or a name of fate synth.")],
    memory: Annotated[
        list[str] | None, typer.Option(help="A budget, repeatable. Default: eight, from the smallest on.")
    ] = None,
    disk: Annotated[Path, typer.Option(help="Directory on the disk where the store will be.")] = Path("."),
    disk_speed: Annotated[
        float | None, typer.Option(min=0.01, help="GB/s that the disk reads, instead of measuring it.")
    ] = None,
    memory_speed: Annotated[
        float | None, typer.Option(min=0.1, help="GB/s at which one token's weights are read, instead of measuring it.")
    ] = None,
    max_context: options.MaxContext = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Sizes, smallest budget, expected speed at each budget. Of a model on the hub only the configuration is read."""
    from fate.tools.preview import preview

    budgets = [parse_memory(size) for size in memory] if memory else None
    with err.status("reading the configuration, measuring this machine"):
        found = preview(
            model,
            budgets=budgets,
            disk=disk,
            disk_gb_per_s=disk_speed,
            memory_gb_per_s=memory_speed,
            max_context=max_context,
            trust_remote_code=trust_remote_code,
        )
    print_facts(_facts(found))
    if found.budgets:
        print_table(out, _table(found))
        out.print("tok/s and first token: predictions (low to high); hits: of recorded routing")
    if json:
        print_json(asdict(found))
    if not found.budgets:
        raise CannotFitError(format_memory_argument(found.smallest))


def _facts(found: Any) -> list[tuple[str, str]]:
    work, machine = found.work, found.machine
    about = "" if found.exact_download else "about "
    return [
        ("model", f"{found.name} ({found.model_type}), {found.parameters / 1e9:.1f} B parameters"),
        (
            "experts",
            f"{work.layers} layers x {work.num_experts}, {work.top_k} per token, "
            f"{format_bytes(work.expert_bytes)} each",
        ),
        ("download", f"{about}{format_bytes(found.download_bytes)}"),
        ("store", f"{format_bytes(found.store_bytes)}, INT4 experts"),
        (
            "smallest budget",
            f"--memory {format_memory_argument(found.smallest)} for a context of {found.envelope.max_context}",
        ),
        ("all in memory", f"--memory {format_memory_argument(found.resident)}"),
        ("prediction", f"{found.prediction} of {work.layers} routers can be asked ahead"),
        (
            "this machine",
            f"weights {machine.kernel_gb_per_s:.1f} GB/s, disk {machine.disk_gb_per_s:.1f} GB/s, "
            f"prompts {machine.prefill_gmacs:.0f} GMAC/s",
        ),
    ]


def _table(found: Any) -> Table:
    table = Table("memory", "experts in it", "hits", "tok/s", "first token", box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for size, at in found.budgets:
        tokens, first = at.tokens_per_s, at.first_token_s
        table.add_row(
            format_bytes(size),
            f"{at.share:.0%}",
            f"{at.hits[0]:.0%}",
            f"{tokens[0]:.1f} ({tokens[1]:.1f} - {tokens[2]:.1f})",
            f"{first[0]:.0f} s ({first[1]:.0f} - {first[2]:.0f})",
        )
    return table
