"""Asking a router outside the model's own forward: what prediction is built on.

A router is called as `type(router).forward(router, ...)`, never as a module: hooks on it would record the prediction
as the model's routing (`output_router_logits`). It gets the rank and the extra arguments it was last called with.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

logger = logging.getLogger("fate.predict")


class RouterGate:
    """`predict.base.Gate` over a transformers router returning (logits, weights, indices)."""

    def __init__(self, router: nn.Module, num_experts: int) -> None:
        self._router = router
        self._num_experts = num_experts
        self._seen: tuple[int, tuple[Any, ...], dict[str, Any]] | None = None
        self._broken = False

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

    def rank(self, gate_input: torch.Tensor) -> tuple[tuple[int, float], ...] | None:
        """Experts chosen for gate_input [tokens, hidden] (any rank), by their share of the routing weights."""
        if self._seen is None or self._broken:
            return None
        ndim, args, kwargs = self._seen
        flat = gate_input.reshape(-1, gate_input.shape[-1])
        shaped = flat if ndim == 2 else flat.reshape(*[1] * (ndim - 2), *flat.shape)
        try:
            with torch.no_grad():
                _, weights, indices = type(self._router).forward(self._router, shaped, *args, **kwargs)
                return self._shares(weights, indices)
        except Exception as error:  # a family's router may be anything; a guess must never stop a run
            self._broken = True
            logger.warning("no prediction from %s: %s", type(self._router).__name__, error)
            return None

    def _shares(self, weights: torch.Tensor, indices: torch.Tensor) -> tuple[tuple[int, float], ...]:
        top_k = indices.shape[-1]
        weights = weights.reshape(-1, top_k).float()
        indices = indices.reshape(-1, top_k)
        shares = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        totals = torch.zeros(self._num_experts + 1).index_add_(0, indices.reshape(-1), shares.reshape(-1))
        found, order = totals[: self._num_experts].sort(descending=True, stable=True)
        pairs = zip(order.tolist(), found.tolist(), strict=True)
        return tuple((expert, min(share, 1.0)) for expert, share in pairs if share > 0)
