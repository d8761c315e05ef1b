"""Today's models at full width: milliseconds a layer, decoding and prefilling, beside what memory allows.

    python benchmarks/shapes.py FOLDER [NAME ...] [--context 128 1500] [--layers 4] [--json FILE]

A store of a few layers of random weights is made in FOLDER for each model (0.5 to 3 GiB, kept), loaded with all experts
in memory, and timed. A layer's time is (step - head) / layers; the model's is that of all its layers and one head.
The bound: the bytes that a token reads (packed matrices, its experts, what caches and states hold) over the bandwidth
that one thread a core reads memory with. Prints one JSON line a model and context.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import fate
from fate.kernels import native
from fate.tools.diagnosis import memory_read_gb_per_s
from fate.tools.synth.shapes import MODELS
from fate.tools.synth.store import synth, synth_config

LAYERS = {"deepseek-v2-lite": 5, "glm-4.7-flash": 5, "gemma-4-26b-a4b": 6}  # a dense first layer, five windows
NEW = "qwen3-30b-a3b qwen3.5-35b-a3b gpt-oss-20b glm-4.7-flash deepseek-v2-lite gemma-4-26b-a4b qwen3-next-80b-a3b"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=NEW.split(), metavar="NAME")
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1500])
    parser.add_argument("--layers", type=int, help="instead of 4 to 6")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path, help="append the lines to this file")
    options = parser.parse_args()
    bandwidth = memory_read_gb_per_s()
    for name in options.names:
        layers = options.layers or LAYERS.get(name, 4)
        store = options.folder / f"{name}-{layers}.fate"
        if not store.exists():
            synth(name, store, num_layers=layers)
        for line in measure(name, store, options.context, options.steps, bandwidth):
            print(json.dumps(line), flush=True)
            if options.json is not None:
                with options.json.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def measure(name: str, store: Path, contexts: list[int], steps: int, bandwidth: float) -> list[dict[str, Any]]:
    lines = []
    published = int(synth_config(name).num_hidden_layers)
    with fate.load(store, experts="100%", max_context=max(contexts) + 4 * steps, on_plan=lambda *_: None) as model:
        model.fate.engine.pool.populate()
        config, head = model.config, model.get_output_embeddings()
        hidden = torch.randn(1, 1, config.hidden_size).to(model.dtype)
        with torch.inference_mode():
            for context in contexts:
                ids = torch.randint(0, config.vocab_size, (1, context))
                prefills = [prefill(model, ids) for _ in range(3 if context <= 2048 else 1)]
                cache = prefills[-1][1]
                for _ in range(steps):  # caches and the switch settle
                    step(model, cache)
                took = [step(model, cache) for _ in range(steps)]
                heads = [timed(lambda: head(hidden)) for _ in range(20)]
                head_ms, step_ms = statistics.median(heads), statistics.median(took)
                layers = config.num_hidden_layers
                layer_ms = (step_ms - head_ms) / layers
                prefill_ms = min(seconds for seconds, _ in prefills) * 1e3
                read = layer_bytes(model, cache)
                bound_ms = read / bandwidth / 1e6
                lines.append(
                    {
                        "model": name,
                        "context": context,
                        "instructions": native.active().name,
                        "native": model.fate.native,
                        "layer_ms": round(layer_ms, 2),
                        "layer_ms_spread": [round((q - head_ms) / layers, 2) for q in statistics.quantiles(took, n=4)],
                        "bound_ms": round(bound_ms, 2),
                        "of_bound": round(bound_ms / layer_ms, 2),
                        "head_ms": round(head_ms, 2),
                        "tokens_per_s": round(1e3 / (layer_ms * published + head_ms), 2),
                        "prefill_layer_ms": round(prefill_ms / layers, 1),
                        "prefill_tokens_per_s": round(context / (prefill_ms * published / layers) * 1e3, 1),
                        "gb_per_s": round(bandwidth, 1),
                    }
                )
    return lines


def prefill(model: Any, ids: torch.Tensor) -> tuple[float, Any]:
    cache, start = model.fate.new_cache(model.config), time.perf_counter()
    for part in ids.split(512, dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - start, cache


def step(model: Any, cache: Any) -> float:
    token = torch.randint(0, model.config.vocab_size, (1, 1))
    return timed(lambda: model(token, past_key_values=cache))


def timed(run: Any) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def layer_bytes(model: Any, cache: Any) -> float:
    """What one token reads, the mean of all layers."""
    layers = next(
        m for name, m in model.named_modules() if name.endswith("layers") and isinstance(m, torch.nn.ModuleList)
    )
    dense = 0
    for module in layers.modules():
        packed = getattr(module, "packed", None)
        dense += packed.numel() if isinstance(packed, torch.Tensor) else 0
        dense += sum(p.nbytes for n, p in module._parameters.items() if p is not None and p.dim() > 1 and not p.is_meta)
    header = model.fate.reader.header
    stats = model.fate.stats().decode
    used = stats.accesses / max(stats.forwards, 1)  # experts of a token, of all layers
    kept = 0
    for layer in cache.layers:
        for held in vars(layer).values():
            for tensor in held.values() if isinstance(held, dict) else [held]:
                kept += tensor.nbytes if isinstance(tensor, torch.Tensor) and tensor.dim() > 2 else 0
        if hasattr(layer, "keys") and isinstance(layer.keys, torch.Tensor) and "keys" not in vars(layer):
            kept += layer.keys.nbytes + layer.values.nbytes
    return (dense + used * header.max_record_bytes + kept) / len(layers)


if __name__ == "__main__":
    assert set(NEW.split()) <= set(MODELS)
    main()
