"""Routers that our kernels stand for, against the families' own code in float64."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from fate.kernels import native
from fate.models.decode.modules import NativeRouter, adopt
from fate.models.decode.watch import Watch

pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")

EXPERTS, HIDDEN, TOP_K = 24, 96, 4
_CONFIG = {
    "num_experts_per_tok": TOP_K,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "hidden_size": HIDDEN,
    "routed_scaling_factor": 1.8,
    "norm_topk_prob": True,
    "n_group": 6,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "softmax": (Qwen2MoeTopKRouter, {}),
    "softmax, not normalised": (Qwen2MoeTopKRouter, {"norm_topk_prob": False}),
    "softmax in groups": (DeepseekV2TopkRouter, {}),
    "softmax, greedy": (DeepseekV2TopkRouter, {"topk_method": "greedy"}),
    "sigmoid in groups": (DeepseekV3TopkRouter, {}),
    "sigmoid, not normalised": (DeepseekV3TopkRouter, {"norm_topk_prob": False}),
    "sigmoid, one group": (DeepseekV3TopkRouter, {"n_group": 1, "topk_group": 1}),
    "softmax of the largest, biased": (GptOssTopKRouter, {}),
}


def router(name: str) -> Any:
    cls, changes = CASES[name]
    made = cls(SimpleNamespace(**{**_CONFIG, **changes})).eval()
    generator = torch.Generator().manual_seed(len(name))
    for tensor in (*made.parameters(), *made.buffers()):  # a correction too, which decides and does not count
        tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator)
        tensor.requires_grad_(False)
    return made


@pytest.mark.parametrize("name", CASES)
def test_chooses_and_weighs_as_its_own_code_does(name: str) -> None:
    made = router(name)
    exact = copy.deepcopy(made).double()
    adopt(made, Watch())
    assert isinstance(made, NativeRouter)
    x = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1))
    logits, scores, indices = made(x)
    wanted_logits, wanted_scores, wanted = exact(x.double())
    torch.testing.assert_close(logits.double(), wanted_logits.double(), rtol=1e-4, atol=1e-4)
    assert [set(row) for row in indices.tolist()] == [set(row) for row in wanted.tolist()]
    spread, expected = (torch.zeros(40, EXPERTS, dtype=torch.float64) for _ in range(2))
    spread.scatter_(1, indices, scores.double())
    expected.scatter_(1, wanted, wanted_scores.double())
    torch.testing.assert_close(spread, expected, rtol=1e-4, atol=1e-5)
