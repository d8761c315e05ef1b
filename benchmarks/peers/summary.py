"""From runs to one document: a row per measure and budget, Fate beside the peer at its best, and the ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from safetensors import safe_open

from benchmarks.peers.comparison import RESIDENT, Results, Settings
from benchmarks.peers.gguf_file import GgufFile
from fate.bench.environment import environment
from fate.models.config import transformers_config
from fate.store.reader import PACKED_FILE, StoreReader, read_config

Run = dict[str, Any]


def document(
    store: Path, files: list[GgufFile], version: str, settings: Settings, results: Results, read_bytes_per_s: float
) -> dict[str, Any]:
    """JSON-ready; every number with its unit in its name. `rows` holds what was measured, `failed` what was not."""
    per_token = weight_bytes_per_token(store)
    return {
        "bench": "peers",
        "store": store.name,
        "settings": asdict(settings),
        "peer": {"name": "llama.cpp", "llama_cpp_python": version, "system": _system(results)},
        "files": {file.form: {"file_bytes": file.file_bytes, "rounding": file.rounding} for file in files},
        "agreement": results.agreement,
        "read_bytes_per_s": read_bytes_per_s,
        "weight_bytes_per_token": per_token,
        "bound_tokens_per_s": read_bytes_per_s / per_token,
        "rows": list(_rows(results, settings)),
        "failed": list(_failures(results)),
        "runs": results.runs,
        "environment": environment(),
    }


def weight_bytes_per_token(store: Path) -> int:
    """What decoding one token must read: dense linears (shared experts and the head among them) and routed experts."""
    reader = StoreReader(store)
    reader.close()
    config = transformers_config(store).get_text_config()
    header, packed = reader.header, read_config(store)["quantization_config"]["packed"]
    experts = sum(header.layout(layer).payload_bytes for layer in range(len(header.layers)))
    with safe_open(store / PACKED_FILE, framework="pt") as file:
        dense = sum(
            file.get_slice(f"{name}.weight").get_shape()[0] for name in packed if packed[name]["kind"] == "linear"
        )
    return int(dense + config.num_experts_per_tok * experts)


def _rows(results: Results, settings: Settings) -> Iterator[dict[str, Any]]:
    for budget, runs in results.runs.items():
        yield from _row("decode", "tokens/s", budget, runs, lambda run: max(run["decode"].values()))
        for tokens in settings.prefills if budget == RESIDENT else ():
            yield from _row(f"prefill {tokens}", "tokens/s", budget, runs, partial(_prefill, tokens))
        yield from _row("launch to first token", "s", budget, runs, lambda run: run["launch_s"], least=True)


def _prefill(tokens: int, run: Run) -> float:
    return float(max(run["prefill"][str(tokens)].values()))


def _row(
    what: str, unit: str, budget: str, runs: dict[str, list[Run]], value: Callable[[Run], float], least: bool = False
) -> Iterator[dict[str, Any]]:
    """One row, where Fate was measured. ratio: how many times as fast as the peer's best setting, None without one."""
    found: dict[str, dict[str, Any]] = {}
    medians: dict[str, float] = {}
    for name, repeats in runs.items():
        values = [value(run) for run in repeats if "failed" not in run]
        if values:
            medians[name] = median(values)
            found[name] = {"median": medians[name], "range": [min(values), max(values)], "repeats": len(values)}
    ours = medians.pop("fate", None)
    if ours is None:
        return
    best = (min if least else max)(medians, key=medians.__getitem__) if medians else None
    ratio = None if best is None else medians[best] / ours if least else ours / medians[best]
    yield {"what": what, "unit": unit, "budget": budget, "engines": found, "best_peer": best, "ratio": ratio}


def _failures(results: Results) -> Iterator[dict[str, str]]:
    for budget, runs in results.runs.items():
        for name, repeats in runs.items():
            for reason in dict.fromkeys(run["failed"] for run in repeats if "failed" in run):
                yield {"budget": budget, "engine": name, "why": reason}


def _system(results: Results) -> str | None:
    """What llama.cpp says it was built for."""
    systems = (run.get("system") for runs in results.runs.values() for repeats in runs.values() for run in repeats)
    return next((system for system in systems if system), None)
