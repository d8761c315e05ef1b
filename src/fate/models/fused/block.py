"""Sparse blocks with a shared expert that has a gate of its own: what comes after the experts in one native call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fate.kernels.fused import add_gated
from fate.models.fused.base import (
    Answer,
    Fused,
    may_be_quick,
    own_tensors,
    passable,
    with_children,
    without_hooks,
)
from fate.models.fused.linear import FusedLinear, fits
from fate.models.fused.mlp import FusedMLP
from fate.models.fused.router import FusedRouter

_KINDS: dict[str, type[nn.Module]] = {
    "gate": FusedRouter,
    "experts": nn.Module,
    "shared_expert": FusedMLP,
    "shared_expert_gate": FusedLinear,
}
_TRIALS = ((1.0, 0.0), (1.0, 100.0), (30.0, 0.0))  # scale of the input, what the experts count


class FusedSharedBlock(Fused):
    """experts(x, routing) + sigmoid(shared_expert_gate(x)) * shared_expert(x): Qwen2-MoE's block and its heirs'."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        children = {name: child for name, child in module._modules.items() if child is not None}
        return (
            "SparseMoeBlock" in type(module).__name__
            and set(children) == set(_KINDS)
            and not own_tensors(module)
            and all(isinstance(children[name], kind) for name, kind in _KINDS.items())
            and bool(children["shared_expert_gate"].out_features == 1)
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not self.training and may_be_quick(args[0]) and self._takes(args[0]):
            x: Tensor = args[0]
            if self.agrees(x.dtype, x):
                return self._quick(x)
        return super().forward(*args, **kwargs)

    def _takes(self, x: Tensor) -> bool:
        gate = self._modules["shared_expert_gate"]
        if not isinstance(gate, FusedLinear) or gate._parameters.get("bias") is not None:
            return False
        weight = gate._parameters.get("weight")
        if weight is None or x.dim() != 3 or weight.shape[0] != 1:
            return False
        return fits(weight, x) and passable((gate,))

    def _quick(self, x: Tensor) -> Tensor:
        """x [batch, tokens, hidden]; the modules are asked in the order of the class's own forward."""
        children: dict[str, Any] = self._modules
        flat = x.view(-1, x.shape[-1])
        shared = children["shared_expert"](flat)
        _, weights, indices = children["gate"](flat)
        out = children["experts"](flat, indices, weights)
        gate = children["shared_expert_gate"]
        if all(may_be_quick(t) and t.dtype == x.dtype and t.shape == flat.shape for t in (out, shared)):
            return add_gated(out, shared, flat, gate.weight).view(x.shape)
        return (out + torch.sigmoid(gate(flat)) * shared).view(x.shape)  # someone's hooks, or experts of another kind

    def _trial(self, generator: torch.Generator, given: Tensor) -> Iterable[tuple[Answer, Answer]]:
        """With experts that give nothing, or what tells how they were weighted; none of the model's is asked for."""
        shared: Any = self._modules["shared_expert"]
        inner = {name: without_hooks(child) for name, child in shared._modules.items() if child is not None}
        quiet = {
            "gate": without_hooks(self._modules["gate"]),
            "shared_expert": with_children(without_hooks(shared), **inner),
        }
        for scale, factor in _TRIALS:
            x = (torch.randn(given.shape, generator=generator) * scale).to(given.dtype)
            block = with_children(self, experts=_Experts(factor), **quiet)
            yield (block._quick(x),), (super(FusedSharedBlock, block).forward(x),)


class _Experts(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        told = weights * (1 + indices / (indices.max() + 1))  # which weight is whose
        return (x * told.sum(dim=-1, keepdim=True) * self._factor).to(x.dtype)
