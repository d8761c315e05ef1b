"""Routers that are a softmax over one matrix's products, for one token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fate.kernels.fused import route
from fate.kernels.native import DTYPE_CODES
from fate.models.fused.base import Answer, Fused, may_be_quick, own_tensors

_TOKENS = 8
_SCALES = (0.01, 1.0, 30.0)  # small ones first: then probabilities of the chosen are far from their shares


class FusedRouter(Fused):
    """(logits, scores, indices) of one token: softmax in float32, the largest top_k, divided by their sum or not, which
    is found by trial. Large inputs find what is capped."""

    top_k: int

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return (
            "Router" in type(module).__name__
            and own_tensors(module) == ["weight"]
            and not module._modules
            and weight is not None
            and weight.dim() == 2
            and isinstance(module.__dict__.get("top_k"), int)
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and may_be_quick(args[0]):
            x: Tensor = args[0]
            weight = self._parameters["weight"]
            if weight is not None and _fits(weight, x) and self.agrees(x.dtype, x):
                return self._quick(x)
        return super().forward(*args, **kwargs)

    def _quick(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normalizes, score_dtype = self.__dict__["_manner"]
        weight = self._parameters["weight"]
        assert weight is not None
        return route(x, weight, self.top_k, normalizes, score_dtype)

    def _trial(self, generator: torch.Generator, given: Tensor) -> Iterable[tuple[Answer, Answer]]:
        """Of near ties either may be chosen: what was chosen is compared by its probabilities."""
        for scale in _SCALES:
            for _ in range(_TOKENS):
                x = (torch.randn(given.shape, generator=generator) * scale).to(given.dtype)
                logits, scores, indices = super().forward(x)
                if "_manner" not in self.__dict__:
                    if scores.dtype not in DTYPE_CODES:
                        raise ValueError(f"its scores are {scores.dtype}")
                    whole = bool((scores.double().sum() - 1).abs() < 0.01)
                    self.__dict__["_manner"] = (whole, scores.dtype)
                ours = self._quick(x)
                shares = logits.float().softmax(dim=-1)
                yield (*ours[:2], shares.gather(1, ours[2])), (logits, scores, shares.gather(1, indices))


def _fits(weight: Tensor, x: Tensor) -> bool:
    return (
        x.shape == (1, weight.shape[1])
        and weight.dtype == x.dtype
        and weight.is_cpu
        and weight.is_contiguous()
        and not weight.requires_grad
    )
