"""Fused modules say what their own class says, and leave to it whatever they do not know."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeDecoderLayer
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeAttention,
    Qwen2MoeDecoderLayer,
    Qwen2MoeMLP,
    Qwen2MoeRMSNorm,
    Qwen2MoeSparseMoeBlock,
    Qwen2MoeTopKRouter,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, Qwen3MoeDecoderLayer

import fate
from fate.kernels import native
from fate.models import fused
from fate.models.attention import ATTENTION_FUNCTION
from fate.models.fused.attention import FusedAttention
from fate.models.fused.block import FusedSharedBlock
from fate.models.fused.layer import FusedLayer
from fate.models.fused.mlp import FusedMLP
from fate.models.fused.norm import FusedRMSNorm
from fate.models.fused.router import FusedRouter
from fate.models.kv_cache import PlannedLayer
from fate.models.packed import PackedLinear
from packed_records import random_record
from tiny import tiny_store

pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")
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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


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


ATTENTIONS = {
    "biases": (Qwen2MoeAttention, {"family": "qwen2_moe", "qkv_bias": True}),
    "norms of heads": (Qwen3MoeAttention, {"family": "qwen3_moe", "head_dim": HIDDEN // HEADS}),
    "norms of all": (OlmoeAttention, {"family": "olmoe"}),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str, dtype: torch.dtype, calls: Calls) -> None:
    cls, settings = ATTENTIONS[name]
    own = build(cls, config(**settings), 0, dtype=dtype)
    ours = make_fused(build(cls, config(**settings), 0, dtype=dtype))
    for batch, past in ((1, 1), (1, 77), (3, 6)):  # the first of them is tried
        given, same = arguments(batch, past, dtype), arguments(batch, past, dtype)
        before = calls.count["attention"]
        (got, _), (expected, _) = ours(**given), own(**same)
        assert calls.count["attention"] > before
        assert near(got, expected)
        for kind in ("keys", "values"):
            layers = [each["past_key_values"].layers[0] for each in (given, same)]
            assert near(getattr(layers[0], kind), getattr(layers[1], kind))


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
    assert isinstance(ours, FusedSharedBlock)
    x = torch.randn(1, 1, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert near(ours(x), own(x))
    assert list(ours._agrees.values()) == [False]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols", [(1, 2048), (8, 70), (3, 5)])
def test_a_matrix_of_few_rows(rows: int, cols: int, dtype: torch.dtype, calls: Calls) -> None:
    torch.manual_seed(rows)
    own = nn.Linear(cols, rows, bias=False, dtype=dtype).eval().requires_grad_(False)
    ours = make_fused(copy.deepcopy(own))
    for shape in ((1, cols), (8, cols), (2, 3, cols)):
        x = torch.randn(shape).to(dtype)
        assert near(ours(x), own(x))
    assert calls.count["linear"] == 4, "a trial, and each of these"
    assert torch.equal(ours(x[:, :1].expand(2, 9, cols)), own(x[:, :1].expand(2, 9, cols)))
    ours(torch.randn(9, cols).to(dtype))
    assert calls.count["linear"] == 4, "many tokens are torch's"


@torch.no_grad()
@pytest.mark.parametrize("linear", [nn.Linear(64, 9, bias=False), nn.Linear(64, 1), nn.Bilinear(64, 64, 1, bias=False)])
def test_other_matrices_are_left_alone(linear: nn.Module) -> None:
    assert type(make_fused(copy.deepcopy(linear))) is type(linear)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_norm_and_router(dtype: torch.dtype, calls: Calls) -> None:
    generator = torch.Generator().manual_seed(1)
    for kind, make in {
        "mlp": lambda: build(Qwen2MoeMLP, config(), dtype=dtype),
        "norm": lambda: build(Qwen2MoeRMSNorm, HIDDEN, dtype=dtype),
        "router": lambda: build(Qwen2MoeTopKRouter, config(norm_topk_prob=True), dtype=dtype),
    }.items():
        own, ours = make(), make_fused(make())
        for scale in (0.01, 1.0, 10.0):
            x = (torch.randn(1, HIDDEN, generator=generator) * scale).to(dtype)
            got, expected = ours(x), own(x)
            if kind == "router":
                assert torch.equal(got[2], expected[2]) or dtype != torch.float32, "only near ties"
                got, expected = torch.cat(got[:2], dim=1), torch.cat(expected[:2], dim=1)
            assert near(got, expected), (kind, scale)
        assert calls.count[kind] > 0
        assert list(ours._agrees.values()) == [True]


class Clamped(Qwen2MoeMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7.0)) * self.up_proj(x).clamp(-7.0, 7.0))


class OneMoreRMSNorm(Qwen2MoeRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) / self.weight * (1 + self.weight)


class SigmoidRouter(Qwen2MoeTopKRouter):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        logits, _, indices = super().forward(hidden_states)
        return logits, logits.sigmoid().gather(1, indices), indices


class Interleaved(Qwen2MoeAttention):
    """Rotates pairs of neighbours: what halves would be are every second element."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        cos, sin = (part.roll(1, dims=-1) for part in position_embeddings)
        return super().forward(hidden_states, position_embeddings=(cos, sin), **kwargs)


class WithoutPositions(Qwen2MoeAttention):
    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        cos, sin = position_embeddings
        rotary = (torch.ones_like(cos), torch.zeros_like(sin))
        return super().forward(hidden_states, position_embeddings=rotary, **kwargs)


class FarAway(Qwen2MoeAttention):
    """Weaker where a text is long."""

    def forward(self, hidden_states: Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
        out, weights = super().forward(hidden_states, **kwargs)
        return out * (0.5 if position_ids.max() > 8192 else 1.0), weights


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        (FusedMLP, Clamped),
        (FusedRMSNorm, OneMoreRMSNorm),
        (FusedRouter, SigmoidRouter),
        (FusedAttention, Interleaved),
        (FusedAttention, WithoutPositions),
        (FusedAttention, FarAway),
        (FusedAttention, OlmoeAttention),
    ],
)
def test_what_computes_otherwise_is_left_alone(kind: Any, cls: type) -> None:
    """Recognised by what it holds, refused by trial - also where the numbers given would not show it."""
    family = {"family": "olmoe", "clip_qkv": 9.0} if cls is OlmoeAttention else {}
    args: tuple[Any, ...] = (HIDDEN,) if kind is FusedRMSNorm else (config(**family),)
    args += (0,) if kind is FusedAttention else ()
    own, ours = build(cls, *args), make_fused(build(cls, *args))
    assert isinstance(ours, kind)
    if kind is FusedAttention:
        got, expected = (each(**arguments(1, 4, torch.float32, 0.1))[0] for each in (ours, own))
    else:
        x = torch.randn(1, HIDDEN) * 0.1
        got, expected = ours(x), own(x)
    assert list(ours._agrees.values()) == [False]
    for a, b in zip(got if isinstance(got, tuple) else [got], expected if isinstance(expected, tuple) else [expected]):
        torch.testing.assert_close(a, b)


@torch.no_grad()
@pytest.mark.parametrize("change", ["hook", "pre-hook", "own forward", "other module", "mask", "argument", "eager"])
def test_attention_falls_back(change: str, calls: Calls) -> None:
    attention: Any = make_fused(build(Qwen2MoeAttention, config(), 0))
    heard: list[int] = []
    given = arguments(1, 3, torch.float32)
    attention(**arguments(1, 3, torch.float32))
    before = calls.count["attention"]
    assert before > 0
    if change == "hook":
        attention.q_proj.register_forward_hook(lambda *args: heard.append(1))
    elif change == "pre-hook":
        attention.o_proj.register_forward_pre_hook(lambda *args: heard.append(1))
    elif change == "own forward":
        forward = attention.v_proj.forward
        attention.v_proj.forward = lambda x: (heard.append(1), forward(x))[1]
    elif change == "other module":
        attention.k_proj = nn.Linear(HIDDEN, KV_HEADS * HIDDEN // HEADS)
    elif change == "mask":
        given["attention_mask"] = torch.zeros(1, 1, 1, 4)
    elif change == "argument":
        given["softcap"] = None
        given["output_attentions"] = True
    else:
        attention.config._attn_implementation = "eager"
    attention(**given)
    assert calls.count["attention"] == before
    assert len(heard) == (change in ("hook", "pre-hook", "own forward"))


@torch.no_grad()
def test_a_router_whose_settings_change(calls: Calls) -> None:
    """With all experts chosen, scores add to one whether the class divides or not; with fewer they do not."""
    own, ours = (build(Qwen2MoeTopKRouter, config(norm_topk_prob=False)) for _ in range(2))
    make_fused(ours)
    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(1))
    for top_k, normalizes in ((12, False), (11, False), (2, False), (2, True), (12, True)):
        for router in (own, ours):
            router.top_k, router.norm_topk_prob = top_k, normalizes
        torch.testing.assert_close(ours(x)[1], own(x)[1], rtol=1e-4, atol=1e-6)
    assert calls.count["router"] > 0


def test_a_fused_module_can_be_copied(calls: Calls) -> None:
    mlp = make_fused(build(Qwen2MoeMLP, config()))
    x = torch.randn(1, HIDDEN)
    expected = mlp(x)
    copied = copy.deepcopy(mlp)
    mlp.gate_proj.packed = torch.zeros_like(mlp.gate_proj.packed)
    assert torch.equal(copied(x), expected)


def test_tensors_are_those_of_the_moment(calls: Calls) -> None:
    """No address outlives its tensor: a weight that is replaced counts from the next call on."""
    x = torch.randn(1, HIDDEN)
    own, ours = (build(Qwen2MoeMLP, config()) for _ in range(2))
    make_fused(ours)
    first = ours(x)
    for module in (own, ours):
        module.gate_proj.packed = random_record(module.gate_proj.layout, seed=9)
    assert calls.count["mlp"] > 0
    assert not near(ours(x), first)
    assert near(ours(x), own(x))
    norm = make_fused(build(Qwen2MoeRMSNorm, HIDDEN))
    before = norm(x)
    norm.weight = nn.Parameter(2 * norm.weight, requires_grad=False)
    torch.testing.assert_close(norm(x), 2 * before)


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


def test_gradients_flow_where_they_are_asked_for(calls: Calls) -> None:
    norm = make_fused(build(Qwen2MoeRMSNorm, HIDDEN))
    x = torch.randn(2, HIDDEN, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert calls.count["norm"] == 0


@pytest.mark.parametrize("cache_kind", ["planned", "growing"])
def test_a_model_uses_all_kinds_and_says_the_same(cache_kind: str, calls: Calls) -> None:
    """Decoding of a loaded Qwen2-MoE, against the same model with its own classes."""
    prompt = torch.randint(0, 256, (1, 26), generator=torch.Generator().manual_seed(3))
    not_used = {"linear", "attention" if cache_kind == "planned" else "layer"}
    with fate.load(tiny_store("qwen2_moe", num_key_value_heads=4, dtype="bfloat16")) as model, torch.inference_mode():
        modules = [module for module in model.modules() if isinstance(module, fused.Fused)]
        answers = []
        for plain in (False, True):
            for module in modules if plain else ():
                module.__class__ = type(module).__mro__[3]
            planned_one = cache_kind == "planned"
            cache = model.fate.new_cache(model.config) if planned_one else DynamicCache(config=model.config)
            model(prompt[:, :20], past_key_values=cache)
            model(prompt[:, 20:21], past_key_values=cache)  # tries what it has not yet tried
            before = dict(calls.count)
            answers.append(
                torch.cat([model(prompt[:, at : at + 1], past_key_values=cache).logits for at in range(21, 26)])
            )
            used = {kind for kind in before if calls.count[kind] > before[kind]}
            assert used == (set() if plain else set(before) - not_used)
    error = (answers[0] - answers[1]).double().norm() / answers[1].double().norm()
    assert error < 0.05
