"""LongCat-Flash: experts beyond the routed ones give back what they are given, and have no weights worth keeping."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

from fate.models.adapters import Adaptation
from fate.models.adapters.stacked import Routed, StackedExperts, blocks


class LongcatExperts(StackedExperts):
    def forward(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """index: from `num_experts` on, the token itself."""
        itself = index >= self.num_experts
        kept = (weights * itself).sum(-1, keepdim=True).to(hidden_states.dtype)
        routed = super().forward(hidden_states, index.clamp(max=self.num_experts), weights.masked_fill(itself, 0.0))
        return routed + hidden_states * kept

    def without_the_rest(self, output: Routed) -> Routed:
        """The router's answer with every expert that has no weights counted as none of ours."""
        logits, weights, index = output
        return logits[..., : self.num_experts], weights, index.clamp(max=self.num_experts)


def adapt(model: PreTrainedModel, done: Adaptation) -> None:
    for _, block in blocks(model, LongcatFlashMoE):
        own = block.experts
        shape = (own.num_routed_experts, own.hidden_size, own.intermediate_size)
        experts = LongcatExperts(model.config, own.down_proj, shape, own.act_fn)
        experts.spare_keys = own.zero_expert_num
        experts.read_router = experts.without_the_rest
        block.experts = experts
