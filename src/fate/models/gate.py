"""Asking a router outside the model's own forward: what prediction is built on.

A router is called as `type(router).forward(router, ...)`, never as a module: hooks on it would record the prediction
as the model's routing (`output_router_logits`). It gets the rank and the extra arguments it was last called with. A
router whose order is that of one matrix's products is asked by that product alone, ten times as fast.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fate.kernels import decode, native
from fate.models.decode.watch import own_class
from fate.models.forms import RANKED_BY_MATRIX, digest
from fate.predict.base import Ranked

logger = logging.getLogger("fate.predict")


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
        self._text = digest(own_class(router).forward)

    @property
    def was_called(self) -> bool:
        """Whether it is known how the model calls this router."""
        return self._seen is not None

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

    def rank(self, gate_input: torch.Tensor, limit: int) -> Sequence[Ranked] | None:
        """See `predict.base.Gate`; gate_input [..., hidden]."""
        matrix = self._matrix(gate_input)
        if matrix is not None:
            return [tuple(row) for row in decode.rank_experts(matrix, gate_input, limit)]
        answer = self._ask(gate_input)
        if answer is None:
            return None
        logits, weights, indices = answer
        indices = indices.reshape(-1, indices.shape[-1])
        if logits.numel() != indices.shape[0] * self._num_experts:
            shares = weights.reshape(indices.shape).float()
            shares = shares / shares.sum(dim=-1, keepdim=True).clamp_min(1e-20)
            return [tuple(zip(*row)) for row in zip(indices[:, :limit].tolist(), shares[:, :limit].tolist())]
        logits = logits.reshape(-1, self._num_experts)
        return [_candidates(*row, limit) for row in zip(logits, indices)]

    def shares(self, gate_input: torch.Tensor) -> Ranked | None:
        """See `predict.base.Gate`."""
        answer = self._ask(gate_input)
        if answer is None:
            return None
        _, weights, indices = answer
        top_k = indices.shape[-1]
        weights, indices = weights.reshape(-1, top_k).float(), indices.reshape(-1, top_k)
        shares = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        totals = torch.zeros(self._num_experts + 1).index_add_(0, indices.reshape(-1), shares.reshape(-1))
        found, order = totals[: self._num_experts].sort(descending=True, stable=True)
        pairs = zip(order.tolist(), found.tolist(), strict=True)
        return tuple((expert, min(share, 1.0)) for expert, share in pairs if share > 0)

    def route(self, gate_input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(indices, weights), each [tokens, top_k], of gate_input [..., hidden]; None: the router cannot be asked."""
        answer = self._ask(gate_input)
        if answer is None:
            return None
        _, weights, indices = answer
        top_k = indices.shape[-1]
        return indices.reshape(-1, top_k), weights.reshape(-1, top_k)

    def _matrix(self, gate_input: torch.Tensor) -> torch.Tensor | None:
        """The router's weight [experts, hidden], where its products have the order of the router's choice."""
        condition = RANKED_BY_MATRIX.get(self._text)
        weight = self._router._parameters.get("weight")
        if condition is None or weight is None or native.extension() is None or weight.shape[0] != self._num_experts:
            return None
        if any(getattr(self._router, name, None) != value for name, value in condition.items()):
            return None
        return weight if weight.dtype == gate_input.dtype and gate_input.is_contiguous() else None

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
        except Exception as error:  # a family's router may be anything; a prefetch must never stop a run
            self._broken = True
            logger.warning("no prediction from %s: %s", type(self._router).__name__, error)
            return None


def _candidates(logits: torch.Tensor, indices: torch.Tensor, limit: int) -> Ranked:
    """One token: the chosen experts, then the others, each by its probability."""
    probabilities = logits.float().softmax(-1).tolist()
    num_experts = len(probabilities)
    chosen = {expert for expert in indices.tolist() if expert < num_experts}
    order = sorted(range(num_experts), key=lambda expert: (expert in chosen, probabilities[expert]), reverse=True)
    return tuple((expert, probabilities[expert]) for expert in order[:limit])
