"""Asking a gate's matrix of one token, against torch."""

import pytest
import torch

from fate.kernels import native
from fate.kernels.decode import rank_experts

cpu = native.extension()


@pytest.mark.skipif(cpu is None, reason="needs the compiled extension")
@pytest.mark.parametrize("experts, hidden, limit", [(60, 2048, 12), (8, 70, 8), (5, 3, 9), (128, 129, 1)])
def test_ranked_probabilities(experts, hidden, limit):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(experts)
        weight = torch.randn(experts, hidden, generator=generator).mul(hidden**-0.5).to(dtype)
        x = torch.randn(hidden, generator=generator).to(dtype)
        (ranked,) = rank_experts(weight, x[None], limit)
        expected, order = (weight.double() @ x.double()).softmax(-1).sort(descending=True)
        assert [expert for expert, _ in ranked] == order[:limit].tolist(), dtype
        assert torch.allclose(torch.tensor([p for _, p in ranked]).double(), expected[: len(ranked)], rtol=1e-4), dtype
