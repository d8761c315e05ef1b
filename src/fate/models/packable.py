"""Which dense matrices are packed: linear and embedding modules large enough to matter and safe to quantize.

>>> packable(model, find_moe_layers(model))["model.layers.0.self_attn.q_proj"]
'linear'
"""

from __future__ import annotations

import re
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from fate.models.adapter import MoELayer
from fate.models.forms import SCALED_EMBEDDINGS, digest

MIN_WEIGHTS = 4096
MIN_ROWS = 8

Kind = Literal["linear", "embedding"]


def packable(model: PreTrainedModel, moe_layers: list[MoELayer]) -> dict[str, Kind]:
    """Module name -> kind of the modules whose `weight` is packed, in model order.

    Left alone: routers, experts modules and everything inside them, subclasses (they may read `weight` in ways of
    their own; embeddings with a scale are known), what the model keeps in float32, and small matrices. Of tied modules
    only the source is named, and only where every module tied to it could be packed as well.
    """
    excluded = {id(inner) for layer in moe_layers for outer in _kept_dense(layer) for inner in outer.modules()}
    keep_fp32 = _fp32_pattern(model)
    kinds: dict[str, Kind] = {}
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind and id(module) not in excluded and not (keep_fp32 and keep_fp32.search(f"{name}.weight")):
            kinds[name] = kind
    ties = _module_ties(model)
    unpackable = {source for target, source in ties.items() if target not in kinds}
    return {name: kind for name, kind in kinds.items() if name not in ties and name not in unpackable}


def packed_ties(model: PreTrainedModel, packed: dict[str, Kind]) -> dict[str, str]:
    """Module name -> the packed module whose stored matrix it shares: `{"lm_head": "model.embed_tokens"}`."""
    return {target: source for target, source in _module_ties(model).items() if source in packed}


def _kept_dense(layer: MoELayer) -> list[nn.Module]:
    return [layer.experts] if layer.router is None else [layer.experts, layer.router]


def _kind(module: nn.Module) -> Kind | None:
    plain = type(module) in (nn.Linear, nn.Embedding) or digest(type(module).forward) in SCALED_EMBEDDINGS
    if not isinstance(module, nn.Linear | nn.Embedding) or not plain:
        return None
    rows, cols = module.weight.shape
    if rows < MIN_ROWS or rows * cols < MIN_WEIGHTS:
        return None
    return "linear" if type(module) is nn.Linear else "embedding"


def _module_ties(model: PreTrainedModel) -> dict[str, str]:
    """Module ties by name (target -> source) of the model's tied weights."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in ties.items()
        if target.endswith(".weight") and source.endswith(".weight")
    }


def _fp32_pattern(model: PreTrainedModel) -> re.Pattern[str] | None:
    patterns: set[str] = set(model._keep_in_fp32_modules or ()) | set(model._keep_in_fp32_modules_strict or ())
    return re.compile("|".join(sorted(patterns))) if patterns else None
