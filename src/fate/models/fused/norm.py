"""RMSNorm as Llama has it, over any number of rows, in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fate.kernels.fused import Norm, rms_norm
from fate.models.fused.base import Answer, Fused, may_be_quick, own_tensors
from fate.models.fused.guard import Guard

_ROWS = 16


class FusedRMSNorm(Fused):
    """weight * x / rms(x). Some classes round x before they multiply, some after: `rounds_first` is found by trial."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return (
            "RMSNorm" in type(module).__name__
            and own_tensors(module) == ["weight"]
            and not module._modules
            and weight is not None
            and weight.dim() == 1
            and isinstance(_eps(module), float)
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not self.training and may_be_quick(args[0]):
            x: Tensor = args[0]
            norm = self.quick_norm(x.dtype)
            if norm is not None and x.shape[-1] == norm.weight.shape[0]:
                return rms_norm(x, norm)
        return super().forward(*args, **kwargs)

    def quick_norm(self, dtype: torch.dtype) -> Norm | None:
        """What the kernel needs, where it agrees with the module for activations of `dtype`."""
        weight = self._parameters["weight"]
        if weight is None or weight.dtype != dtype or weight.requires_grad or not weight.is_cpu:
            return None
        if not self.agrees(dtype, dtype):
            return None
        return Norm(weight, _eps(self), self.__dict__["_rounds_first"])

    def watch(self, guard: Guard) -> bool:
        """Have the guard watch what the kernel's norm depends on; False where someone wants to hear of calls."""
        guard.same(self.__dict__, "variance_epsilon", "eps")
        guard.same_tensor(self._parameters, "weight")
        return guard.unheard(self)

    def _trial(self, generator: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Answer, Answer]]:
        """A class that rounds elsewhere differs in a last bit here and there: the nearer of both ways is taken, and
        agrees all but bit for bit."""
        weight = self._parameters["weight"]
        assert weight is not None
        for scale in (1.0, 1e-3):
            x = (torch.randn(_ROWS, weight.shape[0], generator=generator) * scale).to(dtype)
            own = super().forward(x)
            ways = {first: rms_norm(x, Norm(weight, _eps(self), first)) for first in (True, False)}
            differing = {first: int((out != own).sum()) for first, out in ways.items()}
            first = differing[True] <= differing[False]
            self.__dict__.setdefault("_rounds_first", first)
            first = self.__dict__["_rounds_first"]
            if dtype != torch.float32 and differing[first] > own.numel() // 50:
                raise ValueError(f"{differing[first]} of {own.numel()} elements differ")
            yield (ways[first],), (own,)


def _eps(module: nn.Module) -> Any:
    state = module.__dict__
    return state["variance_epsilon"] if "variance_epsilon" in state else state.get("eps")


def norm_of(module: nn.Module | None, x: Tensor) -> Norm | None:
    """The kernel's norm for a module that is one of ours and agrees; None otherwise."""
    return module.quick_norm(x.dtype) if isinstance(module, FusedRMSNorm) else None
