"""`fate inspect`: what a model is made of, the least memory it runs in, and on a text how well its routers foretell."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fate.cli import options
from fate.cli.output import byte_progress, out, print_facts, print_json, print_table, token_progress
from fate.errors import FateError, UsageError
from fate.units import format_bytes, format_memory_argument

if TYPE_CHECKING:
    from fate.tools.similarity import LayerSimilarity

_DEFAULT_TOKENS = 2048
_MEASURES = ("cosine_to_next", "recall_at_k", "recall_at_2k", "load_balance")


def register(app: typer.Typer) -> None:
    app.command("inspect", epilog="Example: fate inspect assets/mini-moe")(inspect)


def inspect(
    model: options.Model,
    text: Annotated[
        Path | None, typer.Option(help="Also run the model on this text (UTF-8): how far routers can be asked ahead.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help=f"Only so many tokens of the text. Default: {_DEFAULT_TOKENS}.")
    ] = None,
    max_context: options.MaxContext = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Family, layers, experts, bytes at each precision, bits per weight, smallest legal budget."""
    from fate.convert.checkpoint import resolve_source
    from fate.load import load_tokenizer
    from fate.store.reader import is_store
    from fate.tools.evaluate import read_text
    from fate.tools.inspection import inspect_model

    if text is None and max_tokens is not None:
        raise UsageError("--max-tokens is of a text: give --text too")
    content = read_text(text) if text is not None else None
    path = Path(model) if is_store(model) else resolve_source(model)
    with suppress(FateError):
        load_tokenizer(path)  # resident in `fate run` too, and not small where the vocabulary is large
    found = inspect_model(path, max_context, trust_remote_code=trust_remote_code)
    report = _report(found)
    print_facts(_rows(found, report))
    if content is not None:
        layers, tokens = _similarity(model, content, max_tokens or _DEFAULT_TOKENS, max_context)
        out.print(f"\n{tokens} tokens of {text}, each layer's gate and the one before it")
        means = {name: _mean([getattr(layer, name) for layer in layers]) for name in _MEASURES}
        print_table(out, _similarity_table(layers, means))
        report["similarity"] = {"tokens": tokens, "layers": [asdict(layer) for layer in layers], "mean": means}
    if json:
        print_json(report)


def _similarity(model: str, text: str, max_tokens: int, max_context: int | None) -> tuple[list[LayerSimilarity], int]:
    """(Layers, tokens they were measured on.)"""
    from fate.load import ensure_store, load, load_tokenizer
    from fate.tools.similarity import measure_similarity

    with byte_progress() as bar:
        store = ensure_store(model, bar)
    ids = load_tokenizer(store)(text, return_tensors="pt").input_ids[0, :max_tokens]
    loading = load(store, system="load-on-demand", max_context=max_context, on_plan=lambda *_: None)
    with loading as loaded, token_progress() as progress:
        return measure_similarity(loaded, ids, progress), len(ids)


def _similarity_table(layers: list[LayerSimilarity], means: dict[str, float | None]) -> Table:
    top_k = next((layer.top_k for layer in layers if layer.top_k), None)
    k, twice = (top_k, 2 * top_k) if top_k else ("k", "2k")
    table = Table("layer", "cosine to next", f"recall@{k}", f"at {twice}", "busiest/mean", "", box=None, pad_edge=False)
    for column in table.columns[:-1]:
        column.justify = "right"
    for layer in layers:
        cells = (_cell(name, getattr(layer, name)) for name in _MEASURES)
        table.add_row(str(layer.layer), *cells, layer.note)
    table.add_row("mean", *(_cell(name, value) for name, value in means.items()), "")
    return table


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cell(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}" if name.startswith("recall") else f"{value:.3f}"


def _report(found: Any) -> dict[str, Any]:
    from fate.models.activation import recognise

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
        "fused_kernel": sum(recognise(layer.experts) is not None for layer in found.layers),
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
