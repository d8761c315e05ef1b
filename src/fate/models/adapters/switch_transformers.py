"""Switch Transformers: one expert a token, two matrices without a gate, in the encoder and the decoder.

The router answers with a one-hot mask, from which tokens beyond an expert's capacity are missing.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from fate.models.adapters import Adaptation
from fate.models.adapters.stacked import Routed, StackedExperts, blocks, merge


class SwitchExperts(StackedExperts):
    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """mask: one-hot [tokens, 1, experts], all zero for a token that no expert has room for."""
        return super().forward(hidden_states, mask.argmax(-1), weights * mask.sum(-1))


def adapt(model: PreTrainedModel, done: Adaptation) -> None:
    done.top_k = 1
    for _, block in blocks(model, SwitchTransformersSparseMLP):
        one = block.experts["expert_0"]
        intermediate, hidden = one.wi.weight.shape
        shape = (block.router.num_experts, hidden, intermediate)
        block.experts = SwitchExperts(model.config, one.wi.weight, shape, one.act, has_gate=False)
        block.experts.read_router = _read
    done.transforms += [
        merge("mlp.experts.expert_*.wi.weight", "mlp.experts.up_proj"),
        merge("mlp.experts.expert_*.wo.weight", "mlp.experts.down_proj"),
    ]


def _read(output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Routed:
    mask, weights, logits = output
    return logits, weights, mask.argmax(-1, keepdim=True)
