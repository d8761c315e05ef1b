"""Doge: thousands of experts of one hidden unit each, kept as rows of two embeddings, chosen by a product of keys.

An expert is the row it is matched with and the row it adds: an up projection to one unit and a down projection from it.
Its record takes a page and more for a few thousand weights, so offloading such experts costs disk; it is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.models.doge.modeling_doge import DogeCDMoE

from fate.models.adapters import Adaptation
from fate.models.adapters.stacked import StackedExperts, Unflatten, blocks


class DogeBlock(DogeCDMoE):
    """The family's block with its embeddings behind the interface."""

    experts: StackedExperts

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> Any:
        """[batch, tokens, hidden] -> (the same, router logits [2, batch * tokens, keys])."""
        flat = hidden_states.reshape(-1, self.hidden_size)
        logits = self.router_gate(hidden_states).view(2, len(flat), -1)
        (scores_x, scores_y), (indices_x, indices_y) = logits.topk(self.num_keys, dim=-1)
        scores = (scores_x.unsqueeze(-1) + scores_y.unsqueeze(-2)).flatten(-2)
        indices = (indices_x.unsqueeze(-1) * self.num_keys + indices_y.unsqueeze(-2)).flatten(-2)
        best, position = scores.topk(self.top_k, dim=-1)
        weights = F.softmax(best, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        routed = self.experts(flat, indices.gather(-1, position), weights).view(hidden_states.shape)
        shared = self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return shared + routed, logits


def adapt(model: PreTrainedModel, done: Adaptation) -> None:
    done.note = "one record for each hidden unit: exact, but larger on disk"
    for _, block in blocks(model, DogeCDMoE):
        shape = (block.num_experts, block.hidden_size, 1)
        like = block.down_embed.weight
        block.experts = StackedExperts(model.config, like, shape, block.act_fn, has_gate=False)
        del block.down_embed, block.up_embed
        block.__class__ = DogeBlock
    done.transforms += [
        WeightConverter("mlp.down_embed.weight", "mlp.experts.up_proj", operations=[Unflatten(1)]),
        WeightConverter("mlp.up_embed.weight", "mlp.experts.down_proj", operations=[Unflatten(1), Transpose(1, 2)]),
    ]
