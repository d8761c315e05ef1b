"""Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/) over stacks of matrices.

`torch.optim.Muon` takes matrices alone; experts are stacks of thousands of small ones, which this takes in one batched
product each. Everything else (embeddings, norms, biases, routers) is AdamW's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5


class StackedMuon(torch.optim.Optimizer):
    """params: [..., rows, cols]; a group's `split` says how many matrices are stacked in the rows (gate and up: 2).

    lr is per update of unit spectral norm, times sqrt(max(1, rows / cols)). products: the dtype of the iteration.
    """

    def __init__(
        self,
        params: Iterable[dict[str, object]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        products: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "split": 1})
        self._products = products

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, object]) -> None:
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        state["momentum"].lerp_(param.grad, 1 - group["momentum"])
        direction = param.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's
        rows, cols = param.shape[-2] // group["split"], param.shape[-1]
        update = orthogonalize(direction.reshape(-1, rows, cols), self._products).reshape(param.shape)
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update.to(param.dtype), alpha=-group["lr"] * max(1, rows / cols) ** 0.5)


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[n, rows, cols] -> dtype, each with its singular values brought near 1 (quintic Newton-Schulz iteration)."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype).contiguous()
    x = x / x.float().norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7).to(dtype)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x
