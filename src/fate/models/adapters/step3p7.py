"""Step-3.7: experts just as the interface wants them, which the family does not declare."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts, Step3p7SparseMoeBlock

from fate.models.adapters import Adaptation
from fate.models.adapters.stacked import StackedExperts, blocks


class StepExperts(StackedExperts):
    limit: float

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate: Any = Step3p7Experts._apply_gate  # it reads act_fn and limit
        gated: torch.Tensor = gate(self, gate_up)
        return gated


def adapt(model: PreTrainedModel, done: Adaptation) -> None:
    for _, block in blocks(model, Step3p7SparseMoeBlock):
        own = block.experts
        shape = (own.num_experts, own.hidden_dim, own.intermediate_dim)
        block.experts = StepExperts(model.config, own.down_proj, shape, own.act_fn)
        block.experts.limit = own.limit
