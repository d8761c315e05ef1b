from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fate.convert import hqq


def restored(solution: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    codes, scale, offset = solution
    return scale[:, None] * codes.float() + offset[:, None]


def heavy_tailed(groups: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(groups, 64, generator=generator)
    return normal / torch.rand(groups, 64, generator=generator).clamp_min(0.05).sqrt() * 0.02


@pytest.mark.parametrize(
    "weights", [torch.randn(2048, 64, generator=torch.Generator().manual_seed(0)) * 0.02, heavy_tailed(2048)]
)
def test_as_good_as_the_hqq_library(weights: Tensor) -> None:
    quantize = pytest.importorskip("hqq.core.quantize").Quantizer.quantize
    codes, meta = quantize(
        weights.clone(), nbits=4, group_size=64, axis=1, round_zero=True, bitpack=False, device="cpu",
        compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = ((codes.float() - meta["zero"]) * meta["scale"]).view_as(weights) - weights
    ours = restored(hqq.solve(weights)) - weights
    assert ours.norm() <= 1.02 * theirs.norm()
    assert ours.abs().pow(0.7).sum() <= 1.02 * theirs.abs().pow(0.7).sum()


def test_better_than_rounding_between_the_extremes() -> None:
    weights = heavy_tailed(500)
    low, spread = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True) - weights.amin(1, keepdim=True)
    plain = torch.round((weights - low) / spread * 15) / 15 * spread + low
    assert (restored(hqq.solve(weights)) - weights).abs().mean() < 0.99 * (plain - weights).abs().mean()


def test_a_group_does_not_depend_on_its_batch() -> None:
    weights = heavy_tailed(300)
    together = hqq.solve(weights)
    for piece in (slice(0, 1), slice(17, 18), slice(100, 163)):
        assert all(map(torch.equal, hqq.solve(weights[piece]), (part[piece] for part in together)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_use_their_range(bits: int) -> None:
    codes, scale, _ = hqq.solve(heavy_tailed(100), bits=bits)
    assert codes.dtype == torch.uint8
    assert codes.max() == 2**bits - 1
    assert codes.min() == 0
    assert (scale > 0).all()


@pytest.mark.parametrize("width", [1, 36, 64])
def test_constant_groups_are_exact(width: int) -> None:
    values = torch.tensor([0.0, 0.3, -7.0, 1e-8]).repeat_interleave(width).view(4, width)
    for solve in (hqq.solve, hqq.minmax8):
        codes, scale, offset = solve(values)
        assert not codes.any()
        assert not scale.any()
        assert torch.equal(offset, values[:, 0])


@pytest.mark.parametrize("centre, spread", [(0.0, 1e-20), (1.0, 1e-5), (-3.0, 2e-4), (0.0, 1e4)])
def test_groups_far_from_zero_or_of_any_size(centre: float, spread: float) -> None:
    weights = centre + spread * torch.rand(20, 64, generator=torch.Generator().manual_seed(0))
    for solution, levels in ((hqq.solve(weights), 15), (hqq.minmax8(weights), 255)):
        step = (weights.amax(1) - weights.amin(1)) / levels
        worst = (restored(solution) - weights).abs().amax(1)
        assert (worst <= 1.6 * step + 4e-7 * abs(centre)).all()


def test_the_proximal_step_is_the_published_one() -> None:
    x = torch.tensor([-2.0, -0.1, 0.0, 0.1, 0.5])
    expected = torch.sign(x) * torch.relu(x.abs() - x.abs() ** -0.3 / 10)
    assert torch.allclose(hqq.shrink(x, 0.7, 10.0), torch.nan_to_num(expected))


def test_minmax8_hits_both_extremes() -> None:
    weights = heavy_tailed(50)
    values = restored(hqq.minmax8(weights))
    step = (weights.amax(1) - weights.amin(1)) / 255
    assert torch.allclose(values.amin(1), weights.amin(1))
    assert torch.allclose(values.amax(1), weights.amax(1), rtol=1e-5)
    assert ((values - weights).abs().amax(1) <= 0.501 * step).all()
