"""Prefill and decode speed on one given text, with a load of its own for each pass, inside a memory budget."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fate.bench.environment import environment, peak_resident_bytes
from fate.bench.passes import Pass, feed
from fate.engine.session import FateModel
from fate.errors import UsageError
from fate.load import load, load_tokenizer


@dataclass(frozen=True)
class Workload:
    """prompt_tokens are prefilled, new_tokens decoded one by one; the cache of experts is warm from the first on."""

    text: str
    prompt_tokens: int = 64
    new_tokens: int = 64
    repeats: int = 3


def measure(
    store: Path, systems: Sequence[str], workload: Workload, progress: Callable[[str], None], **limits: Any
) -> dict[str, Any]:
    """Interleave `systems` (A B A B), a fresh load each time; limits: memory, experts, max_context for `fate.load`.

    Returns one JSON-ready document with, per system, medians and spread. Raises UsageError if the text is too short.
    """
    ids = _tokens(store, workload)
    limits = {"max_context": ids.shape[1], **{key: value for key, value in limits.items() if value is not None}}
    passes: dict[str, list[Pass]] = {name: [] for name in systems}
    plans: dict[str, dict[str, Any]] = {}
    for repeat in range(workload.repeats):
        for name in systems:
            progress(f"{name}, pass {repeat + 1} of {workload.repeats}")
            with load(store, system=name, on_plan=lambda *_: None, **limits) as model:
                passes[name].append(_run(model, ids, workload.prompt_tokens))
                plan = model.fate.plan
                plans[name] = {
                    "planned_bytes": plan.total,
                    "budget_bytes": plan.budget,
                    "slots": plan.num_slots,
                    "experts": plan.needs.total_experts,
                }
            del model
            gc.collect()  # the next plan must not count this model's weights
    return {
        "bench": "fixed-text",
        "store": store.name,
        "workload": {key: value for key, value in asdict(workload).items() if key != "text"},
        "systems": {name: {**plans[name], **_summary(passes[name], workload)} for name in systems},
        "peak_resident_bytes": peak_resident_bytes(),
        "environment": environment(),
    }


def _tokens(store: Path, workload: Workload) -> torch.Tensor:
    ids = load_tokenizer(store)(workload.text, return_tensors="pt").input_ids
    needed = workload.prompt_tokens + workload.new_tokens
    if ids.shape[1] < needed:
        raise UsageError(f"the text has {ids.shape[1]} tokens, {needed} are needed: give a longer text")
    return ids[:, :needed]


def _run(model: FateModel, ids: torch.Tensor, prompt_tokens: int) -> Pass:
    """A first pass warms the experts' cache; the second is measured."""
    feed(model, ids, prompt_tokens)
    return feed(model, ids, prompt_tokens)


def _summary(passes: list[Pass], workload: Workload) -> dict[str, Any]:
    speeds = sorted(workload.new_tokens / p.decode_s for p in passes)
    middle = sorted(passes, key=lambda p: p.decode_s)[len(passes) // 2]
    stats = middle.stats.decode
    return {
        "decode_tokens_per_s": median(speeds),
        "decode_tokens_per_s_range": [speeds[0], speeds[-1]],
        "prefill_tokens_per_s": median(workload.prompt_tokens / p.ttft_s for p in passes),
        "hit_rate": stats.hit_rate,
        "coverage": stats.coverage,
        "bytes_per_token": stats.bytes_moved / stats.tokens,
        "wasted_bytes_per_token": stats.wasted_bytes / stats.tokens,
        "link_bytes_per_s": stats.bytes_moved / middle.decode_s,
        "stall_share": stats.stall_share,
        "expert_compute_share": stats.expert_compute_s / stats.total_s,
    }
