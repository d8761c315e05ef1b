"""Routers that are a softmax over one matrix's products, for one token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fate.kernels.block import Router
from fate.kernels.fused import route
from fate.kernels.native import DTYPE_CODES
from fate.models.fused.base import Answer, Fused, may_be_quick, own_tensors
from fate.models.fused.guard import Guard

_TOKENS = 8
_OF_GROUPS = ("n_group", "num_group", "topk_group")  # experts chosen within groups: too rarely seen in a trial
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
            and all(module.__dict__.get(name) in (None, 1) for name in _OF_GROUPS)
        )

    @classmethod
    def take(cls, module: nn.Module) -> None:
        super().take(module)
        module.__dict__["_manners"] = {}

    def _settings(self) -> tuple[int, Any]:
        """What a user may change between two calls."""
        return self.top_k, self.__dict__.get("norm_topk_prob")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not self.training and may_be_quick(args[0]):
            x: Tensor = args[0]
            weight = self._parameters["weight"]
            if weight is not None and _fits(weight, x) and self.agrees(x.dtype, x, also=self._settings()):
                return self._quick(x)
        return super().forward(*args, **kwargs)

    def quick_router(self, x: Tensor) -> Router | None:
        """What the kernel needs, where it agrees with the module for one token x [1, hidden]."""
        weight = self._parameters["weight"]
        if weight is None or self.training or not _fits(weight, x):
            return None
        return self._router(x) if self.agrees(x.dtype, x, also=self._settings()) else None

    def watch(self, guard: Guard) -> bool:
        """Have the guard watch what the kernel's router depends on, hooks apart."""
        guard.same(self.__dict__, "top_k", "norm_topk_prob")
        guard.same_tensor(self._parameters, "weight")
        return True

    def _router(self, x: Tensor) -> Router:
        normalizes, score_dtype = self.__dict__["_manners"][x.dtype, self._settings()]
        weight = self._parameters["weight"]
        assert weight is not None
        return Router(weight, self.top_k, normalizes, score_dtype)

    def _quick(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return route(x, *self._router(x))

    def _trial(self, generator: torch.Generator, given: Tensor) -> Iterable[tuple[Answer, Answer]]:
        """Of near ties either may be chosen: what was chosen is compared by its probabilities."""
        weight = self._parameters["weight"]
        assert weight is not None
        drawn = (torch.randn(given.shape, generator=generator) * s for s in _SCALES for _ in range(_TOKENS))
        asked = [(x, super(FusedRouter, self).forward(x)) for x in (some.to(given.dtype) for some in drawn)]
        if (dtype := asked[0][1][1].dtype) not in DTYPE_CODES:
            raise ValueError(f"its scores are {dtype}")
        errors = {
            whole: sum(
                float((route(x, weight, self.top_k, whole, dtype)[1].double() - scores.double()).abs().sum())
                for x, (_, scores, _) in asked
            )
            for whole in (False, True)
        }
        self.__dict__["_manners"][given.dtype, self._settings()] = (errors[True] < errors[False], dtype)
        for x, (logits, scores, indices) in asked:
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
