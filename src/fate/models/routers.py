"""Asking a router outside the model's own forward: what prediction is built on.

A router is called as `type(router).forward(router, ...)`, never as a module: hooks on it would record the prediction
as the model's routing (`output_router_logits`). It gets the rank and the extra arguments it was last called with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fate.kernels import native

logger = logging.getLogger("fate.predict")
QUICK_CHECKS = 8
QUICK_AGREEMENT = 0.9
Ranked = tuple[tuple[int, float], ...]


class RouterGate:
    """`predict.base.Gate` over a transformers router returning (logits, weights, indices), or what `read` makes of
    that."""

    def __init__(
        self, router: nn.Module, num_experts: int, read: Callable[[Any], tuple[torch.Tensor, ...]] | None = None
    ) -> None:
        self._router = router
        self._read = read
        self._num_experts = num_experts
        self._seen: tuple[int, tuple[Any, ...], dict[str, Any]] | None = None
        self._broken = False
        self._matrix: torch.Tensor | None = None  # known when weights are loaded
        self._checks = self._agreed = self._top_k = 0

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Remember how the model calls this router; returns the gate input."""
        kwargs = dict(kwargs)
        gate_input = args[0] if args else kwargs.pop("hidden_states", None)
        extra = (a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.Tensor))
        if any(not isinstance(a, nn.Parameter) for a in extra):
            return None  # what belongs to these tokens says nothing of the next
        if isinstance(gate_input, torch.Tensor):
            self._seen = (gate_input.ndim, args[1:], kwargs)
            return gate_input
        return None

    def route(self, gate_input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(indices, weights), each [tokens, top_k], of gate_input [..., hidden]; None: the router cannot be asked."""
        answer = self._ask(gate_input)
        if answer is None:
            return None
        _, weights, indices = answer
        top_k = indices.shape[-1]
        return indices.reshape(-1, top_k), weights.reshape(-1, top_k)

    def chosen(self, gate_input: torch.Tensor) -> list[int] | None:
        """The experts of one token, ascending; None where the quick way is not known to agree with the router. What
        the router itself says may still differ by a near tie."""
        if self._checks < QUICK_CHECKS or gate_input.numel() != gate_input.shape[-1]:
            return None
        if self._agreed < self._checks * self._top_k - 1:
            return None  # more than a near tie apart: good enough for guesses, not for demands
        quick = self._quick(gate_input, self._top_k)
        return None if quick is None else sorted(expert for expert, _ in quick)

    def rank(self, gate_input: torch.Tensor, limit: int) -> Ranked | None:
        """See `predict.base.Gate`; gate_input [..., hidden]."""
        one_token = gate_input.numel() == gate_input.shape[-1]
        if one_token and (quick := self._quick(gate_input, limit)) is not None and self._checks >= QUICK_CHECKS:
            return quick
        answer = self._ask(gate_input)
        if answer is None:
            return None
        logits, weights, indices = answer
        if not one_token or logits.numel() != self._num_experts:
            return self._shares(weights, indices)[:limit]
        candidates = _candidates(logits, indices, limit)
        self._check(candidates, quick, indices.shape[-1])
        return candidates

    def _quick(self, gate_input: torch.Tensor, limit: int) -> Ranked | None:
        """The same for a router that is one matrix, ten times as fast."""
        if not self._checks:
            self._matrix = _matrix(self._router, self._num_experts)
        cpu, weight = native.extension(), self._matrix
        if cpu is None or weight is None or gate_input.dtype != weight.dtype or not gate_input.is_contiguous():
            return None
        code = native.DTYPE_CODES[weight.dtype]
        return tuple(cpu.rank_experts(weight.data_ptr(), gate_input.data_ptr(), code, *weight.shape, limit))

    def _check(self, candidates: Ranked, quick: Ranked | None, top_k: int) -> None:
        """Whether the matrix alone says what the router says is found out by asking both, the first times. Near ties
        may fall either way."""
        if quick is None:
            return
        ours, theirs = ({expert for expert, _ in ranked[:top_k]} for ranked in (quick, candidates))
        self._checks += 1
        self._top_k = top_k
        self._agreed += len(ours & theirs)
        if self._checks == QUICK_CHECKS and self._agreed < QUICK_AGREEMENT * QUICK_CHECKS * top_k:
            self._matrix = None

    def _ask(self, gate_input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        if self._seen is None or self._broken:
            return None
        ndim, args, kwargs = self._seen
        flat = gate_input.reshape(-1, gate_input.shape[-1])
        shaped = flat if ndim == 2 else flat.reshape(*[1] * (ndim - 2), *flat.shape)
        try:
            with torch.no_grad():
                answer = type(self._router).forward(self._router, shaped, *args, **kwargs)
                logits, weights, indices = answer if self._read is None else self._read(answer)
                if weights.numel() == indices.numel() and indices.shape[-1] <= self._num_experts:
                    return logits, weights, indices
            raise TypeError("it does not answer with (logits, weights, indices)")
        except Exception as error:  # a family's router may be anything; a guess must never stop a run
            self._broken = True
            logger.warning("no prediction from %s: %s", type(self._router).__name__, error)
            return None

    def _shares(self, weights: torch.Tensor, indices: torch.Tensor) -> Ranked:
        top_k = indices.shape[-1]
        weights = weights.reshape(-1, top_k).float()
        indices = indices.reshape(-1, top_k)
        shares = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        totals = torch.zeros(self._num_experts + 1).index_add_(0, indices.reshape(-1), shares.reshape(-1))
        found, order = totals[: self._num_experts].sort(descending=True, stable=True)
        pairs = zip(order.tolist(), found.tolist(), strict=True)
        return tuple((expert, min(share, 1.0)) for expert, share in pairs if share > 0)


def _candidates(logits: torch.Tensor, indices: torch.Tensor, limit: int) -> Ranked:
    """One token: the chosen experts, then the others, each by its probability."""
    probabilities = logits.reshape(-1).float().softmax(-1).tolist()
    num_experts = len(probabilities)
    chosen = {expert for expert in indices.reshape(-1).tolist() if expert < num_experts}
    order = sorted(range(num_experts), key=lambda expert: (expert in chosen, probabilities[expert]), reverse=True)
    return tuple((expert, probabilities[expert]) for expert in order[:limit])


def _matrix(router: nn.Module, num_experts: int) -> torch.Tensor | None:
    """The router's weight [experts, hidden], where it has one that can be multiplied directly."""
    weight = getattr(router, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or weight.shape[0] != num_experts:
        return None
    usable = weight.device.type == "cpu" and weight.is_contiguous() and weight.dtype in native.DTYPE_CODES
    return weight if usable else None
