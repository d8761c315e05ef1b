"""Fused decoder layers and blocks: what their own class says, or left to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.olmoe.modeling_olmoe import OlmoeDecoderLayer
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeDecoderLayer,
    Qwen2MoeMLP,
    Qwen2MoeSparseMoeBlock,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

import fate
from fate.kernels import native
from fate.models.fused.block import FusedBlock
from fate.models.fused.layer import FusedLayer
from fate.models.kv_cache import PlannedLayer
from fused_support import DTYPES, HEADS, HIDDEN, Calls, arguments, build, config, make_fused, near
from tiny import tiny_store

pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")


def planned(growing: DynamicCache, room: int) -> DynamicCache:
    """The planned cache that holds the same."""
    cache = DynamicCache()
    cache.layers = [PlannedLayer(room)]
    cache.layers[0].update(growing.layers[0].keys, growing.layers[0].values)
    return cache


def layer_call(layer: Any, batch: int, past: int, dtype: torch.dtype, room: int | None, scale: float = 1.0) -> Any:
    """(what the layer gives, its cache), the cache planned with this room or growing."""
    given = arguments(batch, past, dtype, scale)
    if past > 6:  # all sequences at one position, as a model says it
        given["position_embeddings"] = tuple(part[:1] for part in given["position_embeddings"])
    if room is not None:
        given["past_key_values"] = planned(given["past_key_values"], room)
    return layer(given.pop("hidden_states"), **given), given["past_key_values"].layers[0]


DENSE = {"mlp_only_layers": [0, 1]}  # a layer around an MLP


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "olmoe"])
def test_layer(family: str, dtype: torch.dtype, calls: Calls) -> None:
    """Biases of queries, keys and values; a bias of the output and norms of heads; norms of all heads."""
    cls, settings = {
        "qwen2_moe": (Qwen2MoeDecoderLayer, {"qkv_bias": True}),
        "qwen3_moe": (Qwen3MoeDecoderLayer, {"attention_bias": True, "head_dim": HIDDEN // HEADS}),
        "olmoe": (OlmoeDecoderLayer, {}),
    }[family]
    own, ours = (build(cls, config(family=family, **settings), 0, dtype=dtype) for _ in range(2))
    for layer in (own, ours):
        layer.mlp = build(Qwen2MoeMLP, config(), dtype=dtype)
    make_fused(ours)
    layer_call(ours, 1, 2, dtype, 96)  # the trial
    for batch, past, scale in ((1, 1, 1.0), (2, 77, 0.01), (3, 6, 30.0)):
        expected, theirs = layer_call(own, batch, past, dtype, None, scale)
        before = calls.count["layer"]
        got, cache = layer_call(ours, batch, past, dtype, 96, scale)
        assert calls.count["layer"] == before + 1
        assert near(got, expected)
        assert near(cache.keys, theirs.keys)
        assert near(cache.values, theirs.values)
        assert cache.get_seq_length() == past + 1


class WeakAttentionDecoderLayer(Qwen2MoeDecoderLayer):
    """As Granite: what attention gives counts less."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + 0.9 * self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class WeakMLPDecoderLayer(Qwen2MoeDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + 0.9 * self.mlp(self.post_attention_layernorm(hidden_states))


class ParallelDecoderLayer(Qwen2MoeDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states))


class NormAfterDecoderLayer(Qwen2MoeDecoderLayer):
    """As OLMo 2: norms of what is added."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.input_layernorm(self.self_attn(hidden_states, **kwargs)[0])
        return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


@torch.no_grad()
@pytest.mark.parametrize(
    "cls", [WeakAttentionDecoderLayer, WeakMLPDecoderLayer, ParallelDecoderLayer, NormAfterDecoderLayer]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_adds_otherwise_is_left_alone(cls: type, dtype: torch.dtype) -> None:
    own, ours = build(cls, config(**DENSE), 0, dtype=dtype), make_fused(build(cls, config(**DENSE), 0, dtype=dtype))
    assert isinstance(ours, FusedLayer)
    (got, cache), (expected, _) = (layer_call(each, 1, 5, dtype, 16) for each in (ours, own))
    assert list(ours._agrees.values()) == [False]
    assert near(got, expected)
    assert cache.get_seq_length() == 6


@torch.no_grad()
@pytest.mark.parametrize(
    "change", ["growing cache", "no room", "own update", "attention hook", "norm hook", "mask", "other norm"]
)
def test_layer_falls_back(change: str, calls: Calls) -> None:
    own, ours = (
        build(Qwen2MoeDecoderLayer, config(**DENSE), 0),
        make_fused(build(Qwen2MoeDecoderLayer, config(**DENSE), 0)),
    )
    layer_call(ours, 1, 5, torch.float32, 16)
    before = calls.count["layer"]
    assert before > 0
    heard: list[int] = []
    if "hook" in change:
        child = ours.self_attn if change == "attention hook" else ours.post_attention_layernorm
        child.register_forward_hook(lambda *args: heard.append(1))
    elif change == "other norm":
        own.input_layernorm = ours.input_layernorm = nn.LayerNorm(HIDDEN)
    if change in ("mask", "own update"):
        results = []
        for layer in (ours, own):
            given = arguments(1, 5, torch.float32)
            cache = given["past_key_values"] = planned(given["past_key_values"], 16)
            if change == "mask":
                given["attention_mask"] = torch.zeros(1, 1, 1, 6)
            elif layer is ours:
                update = cache.update
                cache.update = lambda *args, update=update: (heard.append(1), update(*args))[1]
            results.append(layer(given.pop("hidden_states"), **given))
        got, expected = results
    else:
        (got, cache), (expected, _) = (
            layer_call(each, 1, 5, torch.float32, {"growing cache": None, "no room": 5}.get(change, 16))
            for each in (ours, own)
        )
        assert cache.get_seq_length() == 6
    assert calls.count["layer"] == before
    assert len(heard) == ("hook" in change or change == "own update")
    assert near(got, expected)


class SomeExperts(nn.Module):
    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return (x.roll(1, dims=-1) * weights[:, :1] + indices[:, :1] / 8).to(x.dtype)


def block(cls: type, dtype: torch.dtype) -> Any:
    made = build(cls, config(shared_expert_intermediate_size=192), dtype=dtype)
    made.experts = SomeExperts()
    torch.manual_seed(1)
    made.shared_expert_gate = nn.Linear(HIDDEN, 1, bias=False, dtype=dtype).requires_grad_(False)
    return made


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_block(dtype: torch.dtype, calls: Calls) -> None:
    own, ours = block(Qwen2MoeSparseMoeBlock, dtype), make_fused(block(Qwen2MoeSparseMoeBlock, dtype))
    heard: list[int] = []
    for module in (ours.gate, ours.shared_expert):
        module.register_forward_hook(lambda *args: heard.append(1))
    for tokens in (1, 1, 8):
        x = torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        before, heard[:] = calls.count["block"] if ours._agrees else None, []
        assert near(ours(x), own(x))
        assert before is None or calls.count["block"] == before + 1
        assert len(heard) == 2, "of this call, and of no trial"
    ours.shared_expert_gate.register_forward_hook(lambda *args: heard.append(1))
    before, heard[:] = calls.count["block"], []
    assert near(ours(x), own(x))
    assert calls.count["block"] == before
    assert len(heard) == 3


class UngatedSparseMoeBlock(Qwen2MoeSparseMoeBlock):
    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        shared, (_, weights, indices) = self.shared_expert(x), self.gate(x)
        return (self.experts(x, indices, weights) + shared).view(hidden_states.shape)


class RenormalizedSparseMoeBlock(Qwen2MoeSparseMoeBlock):
    """Weighs experts otherwise than its router says."""

    def weigh(self, weights: Tensor) -> Tensor:
        return weights / weights.sum(dim=-1, keepdim=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        shared, (_, weights, indices) = self.shared_expert(x), self.gate(x)
        out = self.experts(x, indices, self.weigh(weights)) + self.shared_expert_gate(x).sigmoid() * shared
        return out.view(hidden_states.shape)


class ScaledSparseMoeBlock(RenormalizedSparseMoeBlock):
    def weigh(self, weights: Tensor) -> Tensor:
        return weights * 1.1


class FlippedSparseMoeBlock(RenormalizedSparseMoeBlock):
    def weigh(self, weights: Tensor) -> Tensor:
        return weights.flip(-1)


class HalfSparseMoeBlock(Qwen2MoeSparseMoeBlock):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * 0.9


@torch.no_grad()
@pytest.mark.parametrize(
    "cls",
    [
        UngatedSparseMoeBlock,
        HalfSparseMoeBlock,
        RenormalizedSparseMoeBlock,
        ScaledSparseMoeBlock,
        FlippedSparseMoeBlock,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_that_adds_otherwise_is_left_alone(cls: type, dtype: torch.dtype) -> None:
    own, ours = block(cls, dtype), make_fused(block(cls, dtype))
    assert isinstance(ours, FusedBlock)
    x = torch.randn(1, 1, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert near(ours(x), own(x))
    assert list(ours._agrees.values()) == [False]


def test_what_hooks_make_of_a_blocks_parts(calls: Calls) -> None:
    """Another dtype, strides, or gradients: what torch adds, not the kernel."""
    scale = nn.Parameter(torch.full((HIDDEN,), 0.5))
    x = torch.randn(1, 2, HIDDEN, generator=torch.Generator().manual_seed(2))
    made = {
        "gradient": lambda out: out * scale,
        "double": lambda out: out.double(),
        "strides": lambda out: out.t().contiguous().t(),
    }
    for change in made.values():
        own, ours = block(Qwen2MoeSparseMoeBlock, torch.float32), block(Qwen2MoeSparseMoeBlock, torch.float32)
        make_fused(ours)
        with torch.no_grad():
            ours(x)
        before = calls.count["block"]
        for each in (own, ours):
            each.shared_expert.register_forward_hook(lambda module, args, out, change=change: change(out))
        got, expected = ours(x), own(x)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert calls.count["block"] == before
        assert got.requires_grad == expected.requires_grad


def test_outputs_once_asked_for_slow_nothing_down(calls: Calls) -> None:
    """transformers leaves its capturing hooks behind."""
    ids = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(3))
    with fate.load(tiny_store("qwen2_moe", num_key_value_heads=4, dtype="bfloat16")) as model, torch.inference_mode():
        cache = model.fate.new_cache(model.config)
        model(ids[:, :8], past_key_values=cache)
        model(ids[:, 8:9], past_key_values=cache)
        before = calls.count["layer"]
        given = model(ids[:, 9:10], past_key_values=cache, output_attentions=True, output_hidden_states=True)
        assert calls.count["layer"] == before, "attentions are wanted: no layer passes its attention over"
        assert len(given.hidden_states) == model.config.num_hidden_layers + 1
        model(ids[:, 10:11], past_key_values=cache)
        assert calls.count["layer"] == before + model.config.num_hidden_layers
