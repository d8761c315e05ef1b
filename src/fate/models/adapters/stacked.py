"""What adapters build with: an experts module that has transformers' interface, and operations that make its stacked
parameters from the tensors of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class StackedExperts(nn.Module):
    """Experts as the interface wants them, of the dtype and on the device of `like`.

    gate_up_proj [experts, 2 * intermediate, hidden] (up_proj without the 2 if not `has_gate`) and down_proj
    [experts, hidden, intermediate], the last two dimensions exchanged if `is_transposed`; with `has_bias`, their
    biases. A subclass may take other arguments in `forward`, or gate in its own way.

    read_router: (logits, weights, indices) from what the layer's router returns, for prediction; None: it returns
    just these. spare_keys: checkpoint tensors per matrix beyond `num_experts` that belong to no expert of ours.
    """

    _apply_gate = _default_apply_gate

    def __init__(
        self,
        config: PreTrainedConfig,
        like: torch.Tensor,
        shape: tuple[int, int, int],
        act_fn: Callable[[torch.Tensor], torch.Tensor],
        *,
        has_gate: bool = True,
        has_bias: bool = False,
        is_transposed: bool = False,
    ) -> None:
        """shape: (experts, hidden, intermediate)."""
        super().__init__()
        self.config = config
        self.has_gate, self.has_bias, self.is_transposed = has_gate, has_bias, is_transposed
        self.is_concatenated = True
        self.has_post_expert_norm = self._is_expert_parallel = False
        self.act_fn = act_fn
        self.read_router: Callable[[Any], Routed] | None = None
        self.spare_keys = 0
        self.num_experts, hidden, intermediate = shape
        up_name, up = ("gate_up_proj", 2 * intermediate) if has_gate else ("up_proj", intermediate)
        for name, rows, cols in ((up_name, up, hidden), ("down_proj", hidden, intermediate)):
            sizes = (cols, rows) if is_transposed else (rows, cols)
            self.register_parameter(name, _parameter(like, self.num_experts, *sizes))
            if has_bias:
                self.register_parameter(f"{name}_bias", _parameter(like, self.num_experts, rows))

    def forward(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [tokens, hidden], index and weights [tokens, rank] -> [tokens, hidden]."""
        experts: Any = ALL_EXPERTS_FUNCTIONS[self.config._experts_implementation]
        out: torch.Tensor = experts(self, hidden_states, index, weights)
        return out


class Unflatten(ConversionOps):
    """[experts * rows, cols] -> [experts, rows, cols] of every tensor."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        made = {name: _only(value).unflatten(0, (-1, self.rows)) for name, value in input_dict.items()}
        return made if len(made) > 1 else {target_patterns[0]: next(iter(made.values()))}


def blocks(model: PreTrainedModel, kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """(name, block) of every block of a family's class. Its attributes are what transformers makes them."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    yield from found


def merge(source: str, target: str) -> WeightConverter:
    """Stack the tensors of single experts, whose number stands at `*` in `source`."""
    return WeightConverter(source, target, operations=[MergeModulelist(dim=0)])


def _parameter(like: torch.Tensor, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=like.dtype, device=like.device), requires_grad=False)


def _only(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value[0] if isinstance(value, list) else value
    return tensor
