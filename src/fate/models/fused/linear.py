"""Plain matrices of very few rows: the gate of a shared expert is one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fate.kernels.fused import multiply_few_rows
from fate.models.fused.base import Answer, Fused, may_be_quick

_MAX_ROWS = 8  # torch takes 90 us for 2,048 columns in bfloat16 whatever the number of rows


class FusedLinear(Fused):
    """`nn.Linear` without a bias, of at most _MAX_ROWS outputs."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return type(module) is nn.Linear and module.bias is None and module.out_features <= _MAX_ROWS

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not self.training and may_be_quick(args[0]):
            x: Tensor = args[0]
            weight = self._parameters.get("weight")
            plain = weight is not None and self._parameters.get("bias") is None
            if weight is not None and plain and fits(weight, x) and self.agrees(x.dtype, x.dtype):
                return multiply_few_rows(x, weight).view(*x.shape[:-1], weight.shape[0])
        return super().forward(*args, **kwargs)

    def _trial(self, generator: torch.Generator, dtype: torch.dtype) -> Iterable[tuple[Answer, Answer]]:
        weight = self._parameters["weight"]
        assert weight is not None
        x = torch.randn(3, weight.shape[1], generator=generator).to(dtype)
        yield (multiply_few_rows(x, weight),), (super().forward(x),)


def fits(weight: Tensor, x: Tensor) -> bool:
    """Whether `multiply_few_rows` takes them, and few tokens."""
    return (
        0 < x.numel() <= Fused.MAX_TOKENS * x.shape[-1]
        and x.shape[-1] == weight.shape[1]
        and weight.dtype == x.dtype
        and weight.is_cpu
        and weight.is_contiguous()
        and not weight.requires_grad
    )
