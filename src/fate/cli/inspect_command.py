"""`fate inspect`: what a model is made of, and the least memory it runs in."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from fate.cli import options
from fate.cli.output import print_facts, print_json
from fate.errors import FateError
from fate.memory import format_bytes, format_memory_argument


def register(app: typer.Typer) -> None:
    app.command("inspect", epilog="Example: fate inspect assets/mini-moe")(inspect)


def inspect(model: options.Model, max_context: options.MaxContext = None, json: options.Json = False) -> None:
    """Family, layers, experts, bytes at each precision, bits per weight, smallest legal budget."""
    from fate.inspection import inspect_model
    from fate.loading import load_tokenizer
    from fate.store.checkpoint import resolve_source
    from fate.store.reader import is_store

    path = Path(model) if is_store(model) else resolve_source(model)
    with suppress(FateError):
        load_tokenizer(path)  # resident in `fate run` too, and not small where the vocabulary is large
    found = inspect_model(path, max_context)
    report = _report(found)
    print_facts(_rows(found, report))
    if json:
        print_json(report)


def _report(found: Any) -> dict[str, Any]:
    codecs = ["int2", "int4", "bf16", "fp32"]
    return {
        "family": found.model_type,
        "is_store": found.is_store,
        "codec": found.codec,
        "moe_layers": len(found.layers),
        "experts": found.header.num_records,
        "experts_per_token": found.top_k,
        "expert_weights": found.expert_weights,
        "expert_bytes": {codec: found.expert_bytes(codec) for codec in codecs},
        "bits_per_weight": {codec: 8 * found.expert_bytes(codec) / found.expert_weights for codec in codecs},
        "dense_bytes": found.dense_bytes,
        "max_context": found.envelope.max_context,
        "smallest_budget_bytes": found.needs.smallest,
        "resident_budget_bytes": found.needs.smallest
        + (found.needs.max_slots - found.needs.min_slots) * found.needs.slot,
        "prediction": sum(layer.router is not None for layer in found.layers),
        "fused_kernel": sum(layer.is_swiglu for layer in found.layers),
    }


def _rows(found: Any, report: dict[str, Any]) -> list[tuple[str, str]]:
    counts = Counter(layer.num_experts for layer in found.layers)
    experts = ", ".join(f"{layers} layers x {experts}" for experts, layers in counts.items())
    shapes = Counter(tuple(f"{m.name} {m.rows}x{m.cols}" for m in layer.matrices) for layer in found.header.layers)
    kind = f"store, {found.codec} experts" if found.is_store else "checkpoint; figures are of what it converts to"
    rows = [
        ("model", str(found.path)),
        ("kind", kind),
        ("family", found.model_type),
        ("experts", f"{experts}, {found.top_k} per token, {report['expert_weights'] / 1e9:.2f} B weights"),
        ("matrices", "; ".join(", ".join(shape) for shape in shapes)),
    ]
    for codec, size in report["expert_bytes"].items():
        each = size // found.header.num_records
        bits = report["bits_per_weight"][codec]
        rows.append((f"experts {codec}", f"{format_bytes(size)} ({format_bytes(each)} each, {bits:.2f} bits/weight)"))
    context = f"for a context of {found.envelope.max_context}"
    rows += [
        ("dense weights", format_bytes(found.dense_bytes)),
        ("smallest budget", f"--memory {format_memory_argument(found.needs.smallest)} {context}"),
        ("all in memory", f"--memory {format_memory_argument(report['resident_budget_bytes'])} {context}"),
        ("prediction", f"{report['prediction']} of {len(found.layers)} routers can be asked ahead"),
        ("fused kernel", f"{report['fused_kernel']} of {len(found.layers)} layers"),
    ]
    return rows
