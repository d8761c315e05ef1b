"""What tests of native decoding share: counts of native calls, and ways to go without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

import fate
from fate.kernels import decode
from tiny import tiny_store

PROMPT = 8
IDS = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(3))
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_key_value_heads": 4},
    "qwen3_moe": {"num_key_value_heads": 4, "head_dim": 32},
    "olmoe": {"num_key_value_heads": 4},
    "mixtral": {"num_key_value_heads": 4},
}


class Calls:
    """Native calls by name, of one test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.attention = self.experts = self.routed = 0
        attend, compute, route = decode.MixerHalf.__call__, decode.ExpertHalf.__call__, decode.RouterCall.__call__

        def counted_attention(*args: Any, **kwargs: Any) -> Any:
            self.attention += 1
            return attend(*args, **kwargs)

        def counted_experts(*args: Any, **kwargs: Any) -> Any:
            self.experts += 1
            return compute(*args, **kwargs)

        def counted_route(*args: Any, **kwargs: Any) -> Any:
            self.routed += 1
            return route(*args, **kwargs)

        monkeypatch.setattr(decode.MixerHalf, "__call__", counted_attention)
        monkeypatch.setattr(decode.ExpertHalf, "__call__", counted_experts)
        monkeypatch.setattr(decode.RouterCall, "__call__", counted_route)

    def reset(self) -> None:
        self.attention = self.experts = self.routed = 0


@contextmanager
def by_modules() -> Iterator[None]:
    """Somebody hears of every module's calls, so that none may be passed over."""
    handle = register_module_forward_hook(lambda *args: None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def loaded(experts: str | int = "100%", family: str = "qwen2_moe", **options: Any) -> Iterator[Any]:
    store = tiny_store(family, dtype="bfloat16", **SHAPES.get(family, {}))
    with fate.load(store, experts=experts, **options) as model, torch.inference_mode():
        yield model


def begin(model: Any, ids: Tensor = IDS[:1]) -> Any:
    """A planned cache that holds the prompt."""
    cache = model.fate.new_cache(model.config)
    model(ids[:, :PROMPT], past_key_values=cache)
    return cache


def step(model: Any, cache: Any, ids: Tensor = IDS[:1], **options: Any) -> Tensor:
    """Logits [rows, vocabulary] of the next token."""
    at = cache.get_seq_length()
    logits: Tensor = model(ids[:, at : at + 1], past_key_values=cache, **options).logits
    return logits[:, -1]


def decoded(model: Any, cache: Any, count: int, ids: Tensor = IDS[:1]) -> Tensor:
    """Logits [rows, count, vocabulary]."""
    return torch.stack([step(model, cache, ids) for _ in range(count)], dim=1)
