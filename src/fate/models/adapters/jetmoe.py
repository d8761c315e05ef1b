"""JetMoE: its feed-forward experts are offloaded, its attention experts (a twentieth of them) stay resident."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoA, JetMoeMoE

from fate.models.adapters import Adaptation
from fate.models.adapters.stacked import Routed, StackedExperts, blocks


class JetMoeBlock(JetMoeMoE):
    """The family's block with its two stacks of matrices behind the interface."""

    experts: StackedExperts

    def forward(self, layer_input: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, hidden] -> the same."""
        flat = layer_input.reshape(-1, self.input_size)
        *_, logits = self.router(flat)
        _, weights, index = _route(logits, self.router.top_k, flat.dtype)
        return self.experts(flat, index, weights).view(layer_input.shape) + self.bias


def adapt(model: PreTrainedModel, done: Adaptation) -> None:
    done.note = "attention experts stay resident"
    done.resident.update(name for name, _ in blocks(model, JetMoeMoA))
    for _, block in blocks(model, JetMoeMoE):
        shape = (block.router.num_experts, block.input_size, block.hidden_size)
        experts = StackedExperts(model.config, block.input_linear.weight, shape, block.activation)
        top_k = block.router.top_k
        experts.read_router = lambda output, top_k=top_k: _route(output[-1], top_k, torch.float32)
        del block.input_linear, block.output_linear
        block.experts = experts
        block.__class__ = JetMoeBlock
    done.transforms += [
        WeightRenaming("mlp.input_linear.weight", "mlp.experts.gate_up_proj"),
        WeightRenaming("mlp.output_linear.weight", "mlp.experts.down_proj"),
    ]


def _route(logits: torch.Tensor, top_k: int, dtype: torch.dtype) -> Routed:
    """What the router found: it keeps to itself which token chose which expert in which rank."""
    best, index = logits.topk(top_k, dim=1)
    return logits, torch.softmax(best, dim=1).to(dtype), index
