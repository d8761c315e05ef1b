"""Modules with packed random weights, calls of them, and what the tests of fused modules compare and count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache

from fate.models import fused
from fate.models.attention import ATTENTION_FUNCTION
from fate.models.packed import PackedLinear
from packed_records import random_record

DTYPES = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
HIDDEN, HEADS, KV_HEADS = 128, 4, 2


def config(family: str = "qwen2_moe", **settings: Any) -> Any:
    made = AutoConfig.for_model(
        family,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=192,
        num_experts=12,
        num_experts_per_tok=3,
        num_hidden_layers=2,
        **settings,
    )
    made._attn_implementation = ATTENTION_FUNCTION
    return made


def build(cls: type, *args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """A module of `cls` with random weights, its matrices packed."""
    torch.manual_seed(0)
    module = cls(*args, **kwargs).to(dtype).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(0.5, 0.3)
    children = [(parent, *named) for parent in module.modules() for named in parent.named_children()]
    for seed, (parent, name, child) in enumerate(children):
        if isinstance(child, nn.Linear):
            packed = PackedLinear(child, "int4", dtype)
            packed.packed = random_record(packed.layout, seed)
            setattr(parent, name, packed)
    return module


class Calls:
    """Counts the native calls of one test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = dict.fromkeys(("attention", "block", "layer", "linear", "mlp", "norm", "router"), 0)
        for kind, name in (
            ("attention", "attend_project"),
            ("block", "add_gated"),
            ("layer", "attention_half"),
            ("linear", "multiply_few_rows"),
            ("mlp", "gated_mlp"),
            ("norm", "rms_norm"),
            ("router", "route"),
        ):
            module = getattr(fused, kind)
            monkeypatch.setattr(module, name, self._counted(kind, getattr(module, name)))

    def _counted(self, kind: str, real: Any) -> Any:
        def call(*args: Any) -> Any:
            self.count[kind] += 1
            return real(*args)

        return call


def make_fused(module: nn.Module) -> nn.Module:
    """The module and its children, fused."""
    fused.fuse(module)  # type: ignore[arg-type]
    return module


def arguments(batch: int, past: int, dtype: torch.dtype, scale: float = 1.0) -> dict[str, Any]:
    """What a decoder layer gives its attention for one new token, with a cache of `past` positions."""
    generator = torch.Generator().manual_seed(past)
    dim = HIDDEN // HEADS
    angles = torch.rand(batch, 1, dim // 2, generator=generator) * 6
    angles = torch.cat([angles, angles], dim=-1)
    cache = DynamicCache()
    cache.update(*torch.randn(2, batch, KV_HEADS, past, dim, generator=generator).to(dtype), 0)
    return {
        "hidden_states": (torch.randn(batch, 1, HIDDEN, generator=generator) * scale).to(dtype),
        "position_embeddings": (angles.cos().to(dtype), angles.sin().to(dtype)),
        "attention_mask": None,
        "position_ids": torch.full((batch, 1), past),
        "past_key_values": cache,
        "use_cache": True,
    }


def near(ours: Tensor, own: Tensor) -> bool:
    same_form = ours.dtype == own.dtype and ours.shape == own.shape
    return same_form and bool((ours.double() - own.double()).norm() <= DTYPES[own.dtype] * own.double().norm())
