"""Asking a router outside of the model's forward: the quick way must say what the router says, or not be used."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from fate.kernels import native
from fate.models.gate import RouterGate

HIDDEN, EXPERTS, TOP_K = 32, 12, 3


def qwen_router():
    config = AutoConfig.for_model("qwen2_moe", hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=TOP_K)
    return filled(Qwen2MoeTopKRouter(config))


def deepseek_router():
    """What it chooses by is not the order of its products: every expert has a bias."""
    config = AutoConfig.for_model(
        "deepseek_v3",
        hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=1,
        topk_group=1,
    )
    router = filled(DeepseekV3TopkRouter(config))
    router.e_score_correction_bias = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(7))
    return router


def filled(router):
    with torch.no_grad():
        router.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0)))
    return router.requires_grad_(False).eval()


@pytest.mark.parametrize("make", [qwen_router, deepseek_router])
@pytest.mark.parametrize("rows", [1, 5])
def test_it_names_what_the_router_chooses(make, rows, monkeypatch):
    router = make()
    gate, calls = RouterGate(router, EXPERTS), []
    gate.record((torch.zeros(1, HIDDEN),), {})
    x = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1))
    chosen = [set(row) for row in router(x)[2].tolist()]
    real = type(router).forward
    monkeypatch.setattr(type(router), "forward", lambda self, *args: (calls.append(1), real(self, *args))[1])
    ranked = gate.rank(x, 6)
    assert [{expert for expert, _ in row[:TOP_K]} for row in ranked] == chosen
    assert all(len(row) == 6 for row in ranked)
    quick = make is qwen_router and native.extension() is not None
    assert len(calls) == (0 if quick else 1)


def test_shares_of_all_tokens_together():
    gate = RouterGate(qwen_router(), EXPERTS)
    gate.record((torch.zeros(1, HIDDEN),), {})
    shares = [share for _, share in gate.shares(torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2)))]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] <= shares[0] <= 1.0


def test_a_router_of_another_kind_gives_no_prediction(caplog):
    gate = RouterGate(nn.Linear(HIDDEN, EXPERTS), EXPERTS)
    gate.record((torch.zeros(1, HIDDEN),), {})
    assert gate.rank(torch.zeros(1, HIDDEN), 6) is None
    assert gate.route(torch.zeros(1, HIDDEN)) is None
    assert len(caplog.records) == 1, "said once"
