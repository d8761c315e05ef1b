"""Llama 4: its block computes every expert on every token and weights what an expert is given, not what it gives.

Experts that a token did not choose get zeros and give zeros, so only the chosen ones are computed here.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from fate.models.adapters import Adaptation
from fate.models.adapters.stacked import Routed, StackedExperts, blocks


class Llama4Block(Llama4TextMoe):
    """The family's block, giving its experts the chosen tokens alone."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., hidden] -> ([tokens, hidden], router logits [tokens, experts])."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(hidden_states)
        _, weights, index = _read((scores, logits), self.top_k)
        given = (hidden_states[:, None] * weights[..., None]).reshape(-1, self.hidden_dim)  # [tokens * rank, hidden]
        whole = torch.ones_like(index.reshape(-1, 1), dtype=given.dtype)
        routed = self.experts(given, index.reshape(-1, 1), whole)
        out = self.shared_expert(hidden_states)
        out.add_(routed.view(-1, self.top_k, self.hidden_dim).sum(dim=1))
        return out, logits


def adapt(model: PreTrainedModel, done: Adaptation) -> None:
    for _, block in blocks(model, Llama4TextMoe):
        own = block.experts
        shape = (own.num_experts, own.hidden_size, own.intermediate_size)
        experts = StackedExperts(model.config, own.down_proj, shape, own.act_fn, is_transposed=True)
        top_k = block.top_k
        experts.read_router = lambda output, top_k=top_k: _read(output, top_k)
        block.experts = experts
        block.__class__ = Llama4Block


def _read(output: tuple[torch.Tensor, torch.Tensor], top_k: int) -> Routed:
    scores, logits = output
    index = logits.topk(top_k, dim=-1).indices
    return logits, scores.gather(-1, index), index
