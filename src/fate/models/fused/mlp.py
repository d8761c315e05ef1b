"""Gated MLPs with SiLU on packed matrices: shared experts and dense layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fate.kernels.fused import PackedMatrix, gated_mlp
from fate.models.adapter import is_silu
from fate.models.fused.base import Answer, Fused, is_packed, matrices, may_be_quick, own_tensors, passable, watch_packed
from fate.models.fused.guard import Guard

_LINEARS = ("gate_proj", "up_proj", "down_proj")
_LARGE = 1e3  # inputs that find what is clamped
_LARGE_HALF = 30.0  # the same, within what float16 holds


class FusedMLP(Fused):
    """down_proj(act_fn(gate_proj(x)) * up_proj(x)) of a few tokens."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        children: dict[str, Any] = module._modules
        return (
            set(children) - {"act_fn"} == set(_LINEARS)
            and not own_tensors(module)
            and is_silu(getattr(module, "act_fn", None))
            and all(is_packed(children[name]) and children[name].bias is None for name in _LINEARS)
        )

    @classmethod
    def take(cls, module: nn.Module) -> None:
        super().take(module)
        module.__dict__["_matrices"] = matrices(module, _LINEARS)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not self.training and may_be_quick(args[0]) and self._takes(args[0]):
            x: Tensor = args[0]
            if self.agrees(x.dtype, x.dtype):
                return self._quick(x)
        return super().forward(*args, **kwargs)

    def _takes(self, x: Tensor) -> bool:
        children: dict[str, Any] = self._modules
        matrices = self.__dict__["_matrices"]
        return (
            x.numel() <= self.MAX_TOKENS * x.shape[-1]
            and x.shape[-1] == matrices[0].cols
            and children["gate_proj"] is matrices[0].holder
            and children["up_proj"] is matrices[1].holder
            and children["down_proj"] is matrices[2].holder
            and is_silu(self.act_fn)
            and passable(children.values())
        )

    def quick_matrices(self, x: Tensor) -> tuple[PackedMatrix, PackedMatrix, PackedMatrix] | None:
        """Of gate, up and down, where the kernel agrees with the module for x [..., hidden]."""
        if self.training or not self._takes(x) or not self.agrees(x.dtype, x.dtype):
            return None
        gate, up, down = self.__dict__["_matrices"]
        return gate, up, down

    def watch(self, guard: Guard) -> bool:
        """Have the guard watch what the kernel's matrices depend on, hooks of the module itself apart."""
        children: dict[str, Any] = self._modules
        guard.same(children, *_LINEARS, "act_fn")
        guard.same(self.__dict__, "act_fn")
        act = children.get("act_fn")
        return (act is None or guard.unheard(act)) and all(watch_packed(guard, children[name]) for name in _LINEARS)

    def _quick(self, x: Tensor) -> Tensor:
        gate, up, down = self.__dict__["_matrices"]
        if x.dim() == 2:
            return gated_mlp(x, gate, up, down)
        return gated_mlp(x.view(-1, x.shape[-1]), gate, up, down).view(*x.shape[:-1], down.rows)

    def _trial(self, generator: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Answer, Answer]]:
        hidden = self.__dict__["_matrices"][0].cols
        for scale in (1.0, _LARGE_HALF if dtype == torch.float16 else _LARGE):
            x = (torch.randn(2, hidden, generator=generator) * scale).to(dtype)
            yield (self._quick(x),), (super().forward(x),)
