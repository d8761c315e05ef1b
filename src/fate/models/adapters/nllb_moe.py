"""NLLB-MoE: experts with biases and no gate, in some layers of the encoder and the decoder.

transformers 5.23 gives its experts module the one-hot mask of each token's first expert and takes the mask's values,
0 and 1, for expert numbers. So expert 1 serves every token's first choice and expert 0 its second. This adapter does
what transformers does; its output is transformers' own.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

from fate.models.adapters import Adaptation
from fate.models.adapters.stacked import Routed, StackedExperts, blocks, merge

TOP_K = 2


class NllbExperts(StackedExperts):
    moe_token_dropout: float

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """mask, probabilities: [tokens, experts]; at most two probabilities of a token are not zero."""
        weights, chosen = probabilities.topk(TOP_K)
        return super().forward(hidden_states, mask.gather(-1, chosen), weights * (1 - self.moe_token_dropout))


def adapt(model: PreTrainedModel, done: Adaptation) -> None:
    done.top_k = TOP_K
    done.note = "transformers 5.23 serves every token with experts 1 and 0, and so does this"
    for _, block in blocks(model, NllbMoeSparseMLP):
        own = block.experts
        one = own["expert_0"]
        intermediate, hidden = one.fc1.weight.shape
        shape = (own.num_experts, hidden, intermediate)
        experts = NllbExperts(model.config, one.fc1.weight, shape, one.act, has_gate=False, has_bias=True)
        experts.moe_token_dropout = own.moe_token_dropout
        experts.read_router = _read
        block.experts = experts
    for name, ours in (("fc1", "up_proj"), ("fc2", "down_proj")):
        done.transforms += [
            merge(f"ffn.experts.expert_*.{name}.weight", f"ffn.experts.{ours}"),
            merge(f"ffn.experts.expert_*.{name}.bias", f"ffn.experts.{ours}_bias"),
        ]


def _read(output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Routed:
    mask, probabilities, logits = output
    weights, chosen = probabilities.topk(TOP_K)
    return logits, weights, mask.gather(-1, chosen)
