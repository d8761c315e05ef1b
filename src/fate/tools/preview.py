"""What running a model will take and give, from its configuration alone: `fate plan`. No weight is read."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from fate.convert.checkpoint import INDEX_FILE, SINGLE_FILE, resolve_outline
from fate.core import Envelope
from fate.errors import UsageError
from fate.kernels import linear, native
from fate.models.adapter import find_moe_layers
from fate.models.config import transformers_config
from fate.plan import needs as planning
from fate.plan.budget import DEFAULT_PREFILL_CHUNK, Needs
from fate.plan.estimate import Estimate, Machine, Work, estimate
from fate.store.format import LayerSpec, MatrixSpec, RecordLayout, StoreHeader
from fate.store.reader import StoreReader, is_store
from fate.tools.diagnosis import disk_read_gb_per_s
from fate.tools.inspection import meta_model, packed_dense_bytes
from fate.tools.synth.shapes import MODELS
from fate.tools.synth.store import synth_config
from fate.units import MIB

_RUNTIME_BYTES = 800 * MIB  # of a process that only runs a model; this one has measured, too


@dataclass(frozen=True)
class Preview:
    """download_bytes: of the checkpoint's weights; store_bytes: of what it converts to. budgets: bytes and what each
    gives, the smallest first. exact_download: it is the index's figure, not parameters times their size."""

    name: str
    model_type: str
    parameters: int
    download_bytes: int
    exact_download: bool
    store_bytes: int
    smallest: int
    resident: int
    envelope: Envelope
    needs: Needs
    work: Work
    machine: Machine
    budgets: tuple[tuple[int, Estimate], ...]
    prediction: int  # layers whose router can be asked


def preview(
    model: str,
    *,
    budgets: list[int] | None = None,
    disk: Path = Path("."),
    disk_gb_per_s: float | None = None,
    memory_gb_per_s: float | None = None,
    max_context: int | None = None,
    dense_bits: int = 8,
    trust_remote_code: bool = False,
) -> Preview:
    """model: a store, a checkpoint's directory (config.json is enough), a hub id (its configuration is fetched, no
    weights), or a name that `fate synth` knows. budgets: bytes; eight from the smallest to all in memory unless given.

    Raises what reading a configuration raises."""
    config, download, reader = _configuration(model, trust_remote_code)
    built = meta_model(config, trust_remote_code)
    layers = find_moe_layers(built)
    if reader is None:
        specs = tuple(LayerSpec(layer.name, layer.num_experts, layer.matrices) for layer in layers)
        header, dense = StoreHeader("int4", "", config.model_type, specs), packed_dense_bytes(built, layers, dense_bits)
    else:
        header, dense = reader.header, planning.dense_bytes(reader.path)
    envelope = planning.resolve_envelope(built, max_context, 1, DEFAULT_PREFILL_CHUNK, None)
    needs = planning.measure_needs(built, header, dense, envelope)
    needs = replace(needs, runtime=min(needs.runtime, _RUNTIME_BYTES))
    parameters = sum(p.numel() for p in built.parameters())
    work = _work(built, header, dense, parameters)
    machine = measure(disk, disk_gb_per_s, memory_gb_per_s)
    resident = needs.smallest + (needs.max_slots - needs.min_slots) * needs.slot
    transient = planning.transient_slots(built, header)

    def share(budget: int) -> float:
        slots = (budget - needs.fixed) / needs.slot - transient
        return min(max(slots, 0.0) / needs.total_experts, 1.0)

    sizes = sorted(budgets or _spread(needs.smallest, resident))
    found = tuple((size, estimate(work, machine, share(size))) for size in sizes if size >= needs.smallest)
    return Preview(
        model,
        config.model_type,
        parameters,
        download or parameters * built.dtype.itemsize,
        download is not None,
        dense + header.file_bytes,
        needs.smallest,
        resident,
        envelope,
        needs,
        work,
        machine,
        found,
        sum(layer.router is not None for layer in layers),
    )


def measure(disk: Path, disk_gb_per_s: float | None, memory_gb_per_s: float | None) -> Machine:
    """This machine's speeds, in some three seconds; what is given is not measured."""
    if native.extension() is None:
        raise UsageError("estimates are those of the compiled kernels, which this installation lacks: see fate doctor")
    layout = RecordLayout("int4", (MatrixSpec("weight", 8192, 4096),), page_aligned=False)
    generator = torch.Generator().manual_seed(0)
    records = [torch.randint(0, 100, (layout.record_bytes,), dtype=torch.uint8, generator=generator) for _ in range(8)]
    one, many = torch.randn(1, 4096).bfloat16(), torch.randn(128, 4096).bfloat16()
    token_s = _best(lambda: [linear(one, record, layout) for record in records], 5) / len(records)
    prompt_s = _best(lambda: linear(many, records[0], layout), 3)
    speed = disk_read_gb_per_s(disk)[1] if disk_gb_per_s is None else disk_gb_per_s
    reads = memory_gb_per_s or layout.record_bytes / token_s / 1e9
    return Machine(reads, 128 * 8192 * 4096 / prompt_s / 1e9, speed)


def _best(run: Any, repeats: int) -> float:
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _configuration(model: str, trust_remote_code: bool) -> tuple[PreTrainedConfig, int | None, StoreReader | None]:
    """(configuration, bytes of the checkpoint's weights where an index or the files tell, the store if it is one)."""
    if model in MODELS:
        return synth_config(model), None, None
    path = resolve_outline(model)
    reader = StoreReader(path) if is_store(path) else None
    if reader is not None:
        reader.close()
    config = transformers_config(path, trust_remote_code)
    text = config.get_text_config()
    for part in (config, text):
        part.__dict__.pop("quantization_config", None)
    config.dtype = text.dtype = text.dtype or config.dtype or torch.bfloat16
    return config, _indexed_bytes(path), reader


def _indexed_bytes(path: Path) -> int | None:
    try:
        return int(json.loads((path / INDEX_FILE).read_text())["metadata"]["total_size"])
    except (OSError, ValueError, KeyError, TypeError):
        single = path / SINGLE_FILE
        return single.stat().st_size if single.is_file() else None


def _work(model: Any, header: StoreHeader, dense: int, parameters: int) -> Work:
    embeddings, config = model.get_input_embeddings(), model.config.get_text_config()
    table = 0 if embeddings is None or getattr(config, "tie_word_embeddings", False) else embeddings.weight.numel()
    experts = sum(layer.num_experts * sum(m.weights for m in layer.matrices) for layer in header.layers)
    always = max(parameters - experts, 1)
    return Work(
        config.model_type,
        dense_bytes=dense * max(always - table, 0) // always,  # of the table a token reads one row
        expert_bytes=header.layout(0).record_bytes,
        expert_weights=sum(m.weights for m in header.layers[0].matrices),
        dense_weights=max(always - table, 0),
        top_k=planning.top_k(model),
        layers=len(header.layers),
        num_experts=max(layer.num_experts for layer in header.layers),
    )


def _spread(smallest: int, resident: int, count: int = 8) -> list[int]:
    step = (resident - smallest) / (count - 1)
    return [smallest + round(step * index) for index in range(count)]
