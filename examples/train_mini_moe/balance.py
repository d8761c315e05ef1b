"""Load balance of each layer by itself.

transformers' load-balancing loss averages over all layers at once, so that a layer may stay skewed where another is
skewed the other way: the busiest expert of a layer then gets many times the mean. Here every layer pays for its own
skew: num_experts * sum over experts of (share of pairs) * (mean probability), which is 1 at perfect balance (Fedus et
al., arXiv 2101.03961, equation 4), summed over layers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class LayerBalance:
    """Listens to a model's routers; threads that run the model at the same time each see their own forward's."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._seen = threading.local()
        for module in model.modules():
            if hasattr(module, "top_k") and hasattr(module, "num_experts") and hasattr(module, "weight"):
                module.register_forward_hook(self._on_router)

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Fills the list with each layer's loss, in order, while the model runs in this thread."""
        self._seen.losses = losses = []
        try:
            yield losses
        finally:
            self._seen.losses = None

    def _on_router(self, router: nn.Module, args: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        losses = getattr(self._seen, "losses", None)
        if losses is not None:
            logits, _, chosen = output
            losses.append(balance_loss(logits, chosen))


def balance_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    """logits [tokens, experts], chosen int [tokens, k] -> a scalar, 1 where both are uniform."""
    num_experts = logits.shape[-1]
    share = torch.bincount(chosen.reshape(-1), minlength=num_experts).float() / chosen.numel()
    probability = logits.float().softmax(dim=-1).mean(dim=0)
    return num_experts * (share * probability).sum()
