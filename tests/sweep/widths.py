"""One token through layers of published width, for every family whose text model generates: milliseconds a layer, and
what reading its weights takes, at three lengths of context. Tiny models hide what grows with channels and context.

    python -m sweep.widths [FAMILY ...] [--json FILE]

Two to four layers of random weights with few experts (a token reads as many as the published model's). A layer fails
that takes more than SLOW times its bound, or GROWS times as long at the longest context as at the shortest beyond what
reading its cache takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fate
from fate.tools.diagnosis import memory_read_gb_per_s
from fate.tools.synth import shapes, store
from sweep.discovery import Family, find_adapted, find_families, find_family
from sweep.tiny_configs import OWN

CONTEXTS = (16, 512, 2048)
SLOW, GROWS = 4.0, 1.5
OVERHEAD_MS = 0.3  # of a layer's calls, which no bound counts
LAYERS = 4
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers")
_PATTERNS = (  # which layers are of which kind
    *("layer_types", "mlp_layer_types", "layers_block_type", "attn_layer_period", "attn_layer_offset"),
    *("layer_group_size", "num_hidden_layers", "is_moe", "enable_moe_block"),
)
_IDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None, "vocab_size": 1024}


def wide_settings(family: Family) -> dict[str, Any]:
    """The class's own widths; few layers, few experts, a small vocabulary."""
    settings: dict[str, Any] = {"model_type": family.model_type, **_IDS, "max_position_embeddings": 4096}
    for field in dataclasses.fields(family.config):
        default = None if field.default is dataclasses.MISSING else field.default
        if field.name in _COUNTS and isinstance(default, int):
            settings[field.name] = min(default, 16)
        elif field.name in _DEPTHS:
            settings[field.name] = LAYERS
        elif field.name in ("n_group", "topk_group") and default and default > 1:
            settings[field.name] = {"n_group": 4, "topk_group": 2}[field.name]
        elif field.name in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index") and default:
            settings[field.name] = 1
    names = {field.name for field in dataclasses.fields(family.config)}
    settings |= {name: value for name, value in OWN.get(family.model_type, {}).items() if name in _PATTERNS}
    return {name: value for name, value in settings.items() if name in names or name == "model_type"}


def measure(family: Family, bandwidth: float) -> dict[str, Any]:
    """One line of the result: `ms` by context, `bound_ms`, and `reason` where it fails or could not be built."""
    result: dict[str, Any] = {"family": family.name}
    folder = Path(tempfile.mkdtemp(prefix="fate-widths-"))
    try:
        shapes.MODELS["wide"] = wide_settings(family)
        made = store.synth("wide", folder / "store", routing="uniform")
        with fate.load(made, experts="100%", max_context=2560, on_plan=lambda *_: None) as model:
            result |= timed(model, bandwidth)
        result["reason"] = verdict(result)
    except Exception as error:  # a family that cannot be built says why
        result["reason"] = (
            f"not measured: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        )
    finally:
        shapes.MODELS.pop("wide", None)
        shutil.rmtree(folder, ignore_errors=True)
    return result


def timed(model: Any, bandwidth: float) -> dict[str, Any]:
    layers = len({layer.module for layer in model.fate.reader.header.layers})
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", layers)
    head, vocabulary = model.get_output_embeddings(), model.config.get_text_config().vocab_size
    hidden = torch.randn(1, 1, model.config.get_text_config().hidden_size).to(model.dtype)
    ms, cache_bytes, prefill = {}, {}, 0.0
    with torch.inference_mode():
        for context in CONTEXTS:
            cache, start = None, time.perf_counter()
            for part in torch.randint(0, vocabulary, (1, context)).split(512, dim=1):
                cache = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            prefill = (time.perf_counter() - start) / context * 1e3 / depth
            step = functools.partial(model, torch.randint(0, vocabulary, (1, 1)), past_key_values=cache, use_cache=True)
            steps = [_ms(step) for _ in range(24)][8:]
            heads = [_ms(functools.partial(head, hidden)) for _ in range(8)]
            ms[context] = round((statistics.median(steps) - statistics.median(heads)) / depth, 2)
            cache_bytes[context] = sum(map(_bytes, cache.layers)) / depth
    stats = model.fate.stats().decode
    experts = stats.accesses / max(stats.forwards, 1) * model.fate.reader.header.max_record_bytes
    dense = sum(_dense_bytes(module) for name, module in model.named_modules() if "layers." in name)
    bound = {c: round(((dense + experts) / depth + cache_bytes[c]) / bandwidth / 1e6, 2) for c in CONTEXTS}
    return {"native": model.fate.native, "ms": ms, "bound_ms": bound, "prefill_ms_a_token": round(prefill, 3)}


def verdict(result: dict[str, Any]) -> str:
    ms, bound = result["ms"], result["bound_ms"]
    slow = [c for c in CONTEXTS if ms[c] > SLOW * bound[c] + OVERHEAD_MS]
    if slow:
        return f"slow: {ms[slow[0]]} ms a layer at {slow[0]}, its bound is {bound[slow[0]]}"
    first, last = CONTEXTS[0], CONTEXTS[-1]
    if ms[last] > GROWS * ms[first] + SLOW * (bound[last] - bound[first]) + OVERHEAD_MS:
        return f"grows: {ms[first]} ms a layer at {first}, {ms[last]} at {last}"
    return ""


def _ms(run: Any) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _dense_bytes(module: torch.nn.Module) -> int:
    packed = getattr(module, "packed", None)
    size = packed.numel() if isinstance(packed, torch.Tensor) else 0
    return size + sum(p.nbytes for p in module._parameters.values() if p is not None and p.dim() > 1 and not p.is_meta)


def _bytes(layer: Any) -> int:
    held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    for states in (getattr(layer, "conv_states", None), getattr(layer, "recurrent_states", None)):
        held += states.values() if isinstance(states, dict) else []
    return sum(t.nbytes for t in held if isinstance(t, torch.Tensor))


def main() -> int:
    from sweep.__main__ import _hush

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    _hush()
    families = [find_family(n) for n in options.families] or [*find_families(), *find_adapted()]
    bandwidth, failed = memory_read_gb_per_s(), 0
    for family in families:
        result = measure(family, bandwidth)
        failed += bool(result["reason"])
        print(json.dumps(result), flush=True)
        if options.json is not None:
            with options.json.open("a") as file:
                file.write(json.dumps(result) + "\n")
    print(f"{len(families) - failed} within their bounds, {failed} not; memory reads {bandwidth:.1f} GB/s")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
