"""Routers asked outside the model's forward: the quick way must say what the router says, or not be used."""

import pytest
import torch
from torch import nn

from fate.kernels import native
from fate.models.gate import QUICK_CHECKS, RouterGate

HIDDEN, EXPERTS, TOP_K = 32, 12, 3


class Router(nn.Module):
    """Top-k of softmax, after adding a `bias` to what is chosen by."""

    def __init__(self, bias=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, generator=generator))
        self.bias = bias * torch.randn(EXPERTS, generator=generator)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        logits = x @ self.weight.T
        _, indices = (logits + self.bias).topk(TOP_K, dim=-1)
        return logits, logits.softmax(-1).gather(-1, indices), indices


def asked(router, times):
    """What a gate answered, and what the router chose itself, `times` times."""
    gate, generator, answers = RouterGate(router, EXPERTS), torch.Generator().manual_seed(1), []
    gate.record((torch.zeros(1, HIDDEN),), {})
    for _ in range(times):
        x = torch.randn(1, 1, HIDDEN, generator=generator)
        ranked = gate.rank(x, 6)
        chosen = set((x.reshape(-1) @ router.weight.T + router.bias).topk(TOP_K).indices.tolist())
        answers.append((ranked, chosen))
    return answers


@pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")
def test_a_router_that_is_one_matrix_is_asked_the_quick_way():
    router = Router()
    answers = asked(router, 30)
    assert router.calls == QUICK_CHECKS
    assert all({expert for expert, _ in ranked[:TOP_K]} == chosen for ranked, chosen in answers)
    assert all(len(ranked) == 6 for ranked, _ in answers)


def test_a_router_that_is_more_than_its_matrix_is_asked_itself():
    router = Router(bias=8.0)
    answers = asked(router, 30)
    assert router.calls == 30
    assert all({expert for expert, _ in ranked[:TOP_K]} == chosen for ranked, chosen in answers)


def test_several_tokens_give_shares_of_the_chosen():
    gate = RouterGate(Router(), EXPERTS)
    gate.record((torch.zeros(1, HIDDEN),), {})
    ranked = gate.rank(torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2)), EXPERTS)
    shares = [share for _, share in ranked]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] <= shares[0] <= 1.0


def test_a_router_of_another_kind_gives_no_prediction(caplog):
    gate = RouterGate(nn.Linear(HIDDEN, EXPERTS), EXPERTS)
    gate.record((torch.zeros(1, HIDDEN),), {})
    assert gate.rank(torch.zeros(1, HIDDEN), 6) is None
    assert gate.route(torch.zeros(1, HIDDEN)) is None
    assert len(caplog.records) == 1, "said once"
