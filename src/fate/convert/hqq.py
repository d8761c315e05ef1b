"""Half-Quadratic Quantization of groups of weights (Badri & Shaji, 2023), and plain min-max for 8 bits.

A group w is stored as codes q with w ~ a * q + b. HQQ keeps the min-max scale and moves the offset to lower the
error's p-norm: the error is shrunk by the proximal operator of |.|^p, and the offset that best explains the rest is
a mean. The best iterate is kept per group (the published code stops all groups together), so a group's result does
not depend on what else is quantized with it.

This file is the meaning, in torch; `fate.convert.encode` runs the compiled version of the same steps where it can.

>>> codes, scale, offset = solve(torch.randn(1000, 64))
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 20
P = 0.7
BETA = 10.0
KAPPA = 1.01
_FLAT = 1e-30  # a group whose values spread less is constant


def solve(
    groups: Tensor,
    bits: int = 4,
    iterations: int = ITERATIONS,
    p: float = P,
    beta: float = BETA,
    kappa: float = KAPPA,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [G, n], scale a [G], offset b [G]) such that groups ~ a * codes + b.

    groups: float32 [G, n], of magnitude around 1 or below (p and beta are tuned to weights). A constant group gives
    a = 0, b = its value, codes 0.
    """
    levels = float(2**bits - 1)
    low = groups.amin(1, keepdim=True)
    spread = groups.amax(1, keepdim=True) - low
    flat = spread <= _FLAT
    scale = torch.where(flat, 1.0, spread / levels)
    inverse = 1 / scale
    scaled = (groups - low) * inverse
    # The zero point, relative to the group's minimum: absolute ones lose their digits in groups far from zero. HQQ
    # starts from the rounded absolute one.
    shift = -low * inverse
    zero = torch.where(shift.abs() < 2**22, torch.round(shift) - shift, 0.0)
    best_zero, best_error = zero, torch.full_like(zero, torch.inf)
    for _ in range(iterations):
        codes = torch.round(scaled + zero).clamp_(0, levels)
        residual = scaled + zero - codes
        error = residual.abs().sum(1, keepdim=True)
        better = error < best_error
        if not better.any():
            break
        best_zero, best_error = torch.where(better, zero, best_zero), torch.where(better, error, best_error)
        shrunk = shrink(residual * scale, p, beta) * inverse
        # A group that got no better stays where it is, as if it had stopped.
        zero = torch.where(better, torch.mean(codes - scaled + shrunk, dim=1, keepdim=True), zero)
        beta *= kappa
    codes = torch.round(scaled + best_zero).clamp_(0, levels)
    codes = torch.where(flat, 0.0, codes).to(torch.uint8)
    offset = torch.where(flat, low, low - best_zero * scale)
    return codes, torch.where(flat, 0.0, scale).squeeze(1), offset.squeeze(1)


def shrink(x: Tensor, p: float, beta: float) -> Tensor:
    """Proximal operator of |x|^p / beta as HQQ approximates it: sign(x) * relu(|x| - |x|^(p-1) / beta)."""
    magnitude = x.abs()
    return torch.sign(x) * torch.relu(magnitude - magnitude.pow(p - 1) / beta)


def minmax8(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `solve`, with 8-bit codes between the group's extremes and no optimisation."""
    low = groups.amin(1, keepdim=True)
    spread = groups.amax(1, keepdim=True) - low
    flat = spread <= _FLAT
    scale = torch.where(flat, 0.0, spread / 255.0)
    codes = torch.where(flat, 0.0, torch.round((groups - low) / torch.where(flat, 1.0, scale)).clamp_(0, 255))
    return codes.to(torch.uint8), scale.squeeze(1), low.squeeze(1)
