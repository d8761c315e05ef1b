"""Fused modules say what their own class says, and leave to it whatever they do not know."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeAttention,
    Qwen2MoeMLP,
    Qwen2MoeRMSNorm,
    Qwen2MoeTopKRouter,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

import fate
from fate.kernels import native
from fate.models import fused
from fate.models.fused.attention import FusedAttention
from fate.models.fused.mlp import FusedMLP
from fate.models.fused.norm import FusedRMSNorm
from fate.models.fused.router import FusedRouter
from fused_support import DTYPES, HEADS, HIDDEN, KV_HEADS, Calls, arguments, build, config, make_fused, near
from packed_records import random_record
from tiny import tiny_store

pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")


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
