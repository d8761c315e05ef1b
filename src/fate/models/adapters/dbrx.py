"""DBRX: a layer's experts are rows of three flat matrices, and its router answers with logits alone."""

from __future__ import annotations

from functools import partial

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, Transpose, WeightConverter
from transformers.models.dbrx.modeling_dbrx import DbrxFFN

from fate.models.adapters import Adaptation
from fate.models.adapters.stacked import Routed, StackedExperts, Unflatten, blocks


class DbrxStackedExperts(StackedExperts):
    def forward(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [batch, tokens, hidden] -> the same shape."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return super().forward(flat, index, weights).view(hidden_states.shape)


def adapt(model: PreTrainedModel, done: Adaptation) -> None:
    settings = model.config.ffn_config
    done.top_k = settings.moe_top_k
    for _, block in blocks(model, DbrxFFN):
        own = block.experts
        shape = (own.num_experts, own.hidden_size, own.ffn_hidden_size)
        experts = DbrxStackedExperts(model.config, own.mlp.w1, shape, own.mlp.activation_fn)
        experts.read_router = partial(_read, settings.moe_top_k)
        block.experts = experts
    rows = settings.ffn_hidden_size
    done.transforms += [
        WeightConverter(
            ["ffn.experts.mlp.w1", "ffn.experts.mlp.v1"],
            "ffn.experts.gate_up_proj",
            operations=[Unflatten(rows), Concatenate(dim=1)],
        ),
        WeightConverter(
            "ffn.experts.mlp.w2", "ffn.experts.down_proj", operations=[Unflatten(rows), Transpose(dim0=1, dim1=2)]
        ),
    ]


def _read(top_k: int, logits: torch.Tensor) -> Routed:
    weights, indices = logits.softmax(-1).topk(top_k, dim=-1)
    return logits, weights, indices
