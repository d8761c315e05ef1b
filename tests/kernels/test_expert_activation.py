"""Experts of every activation, gated or not, with and without biases, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from fate.core import Precision
from fate.kernels import ExpertActivation, ExpertBiases, experts, reference
from fate.store.format import RecordLayout
from packed_records import DEPTHS, expert_layout, random_record, relative_error

HIDDEN, INNER, EXPERTS, TOKENS = 160, 100, 3, 101
FORMS = {
    "silu": ExpertActivation("silu"),
    "gelu": ExpertActivation("gelu"),
    "gelu_tanh": ExpertActivation("gelu_tanh"),
    "relu": ExpertActivation("relu"),
    "relu2": ExpertActivation("relu2"),
    "quick_gelu": ExpertActivation("silu", alpha=1.702),
    "clamped": ExpertActivation("silu", gate_max=1.5, up_limit=1.0),
    "clamped after": ExpertActivation("silu", act_max=1.2, up_limit=1.0),
    "clamped gelu": ExpertActivation("gelu", gate_max=1.5, up_limit=1.0),
    "gpt_oss": ExpertActivation("silu", alpha=1.702, gate_max=1.5, up_limit=1.0, up_offset=1.0),
    "softcap": ExpertActivation("silu_softcap", gate_max=1.5, up_limit=2.0),
    "softcap of up": ExpertActivation("silu_softcap", up_limit=2.0),
}
SHAPES = {
    "gated": {},
    "interleaved": {"interleaved": True},
    "plain": {"gated": False},
}


def shapes_of(form: ExpertActivation) -> dict[str, ExpertActivation]:
    """A plain expert has nothing to clamp before or beside its gate."""
    clamped = form != ExpertActivation(form.kind, alpha=form.alpha)
    return {shape: replace(form, **change) for shape, change in SHAPES.items() if shape != "plain" or not clamped}


@cache
def pool_of(codec: str, gated: bool) -> tuple[RecordLayout, Tensor]:
    layout = expert_layout(codec, HIDDEN, INNER, gated)
    return layout, torch.cat([random_record(layout, seed) for seed in range(EXPERTS)])


X = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))


def run(
    kernel: Callable[..., None],
    form: ExpertActivation,
    depth: tuple[str, Precision],
    biases: ExpertBiases | None,
    tokens: Sequence[int] = range(TOKENS),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows [TOKENS, HIDDEN] of `dtype`, of tokens `tokens` only; token t is of expert t % EXPERTS."""
    codec, precision = depth
    layout, pool = pool_of(codec, form.gated)
    order = sorted(tokens, key=lambda token: token % EXPERTS)
    pairs = torch.tensor([[token, 0] for token in order], dtype=torch.int32)
    bounds = [0, *(sum(token % EXPERTS <= e for token in order) for e in range(EXPERTS))]
    offsets = [e * layout.record_bytes for e in range(EXPERTS)]
    rows = torch.zeros(TOKENS, 1, HIDDEN, dtype=dtype)
    kernel(X, pool, layout, offsets, [precision] * EXPERTS, bounds, pairs, rows, form, biases)
    return rows[:, 0]


def random_biases(form: ExpertActivation, dtype: torch.dtype = torch.float32) -> ExpertBiases:
    """As large as what the matrices give, of more experts than a call has."""
    generator = torch.Generator().manual_seed(2)
    first = 0.4 * torch.randn(5, (2 if form.gated else 1) * INNER, generator=generator)
    return ExpertBiases(first.to(dtype), 0.1 * torch.randn(5, HIDDEN, generator=generator).to(dtype), [4, 1, 3])


@cache
def exact_rows(form: ExpertActivation, depth: tuple[str, Precision], biased: bool) -> Tensor:
    return run(reference.experts, form, depth, random_biases(form) if biased else None, dtype=torch.float64)


@pytest.mark.parametrize("name", FORMS)
def test_close_to_exact_arithmetic(kernel: str, name: str) -> None:
    for (shape, form), depth, biased in itertools.product(shapes_of(FORMS[name]).items(), DEPTHS, (False, True)):
        # A square and a product multiply three rounded numbers; no family has that.
        bound = 1e-5 if kernel == "torch" else 0.013 if form.kind == "relu2" and form.gated else 0.01
        biases, what = random_biases(form) if biased else None, (shape, depth, biased)
        ours = run(experts, form, depth, biases)
        assert relative_error(ours, exact_rows(form, depth, biased)) < bound, what
        if kernel != "torch":
            for tokens in ([5], range(7), range(0, TOKENS, 3)):
                assert torch.equal(run(experts, form, depth, biases, tokens)[tokens], ours[tokens]), (what, tokens)


def test_biases_in_half_precision_are_read_exactly(kernel: str) -> None:
    form = ExpertActivation("silu", interleaved=True)
    for dtype in (torch.bfloat16, torch.float16):
        half = random_biases(form, dtype)
        same = ExpertBiases(half.first.float(), half.down.float(), half.numbers)
        assert torch.equal(*(run(experts, form, DEPTHS[0], biases) for biases in (half, same))), dtype


EXTREMES = torch.tensor([0.0, 1e-8, 1e-4, 0.1, 0.24, 0.26, 0.9, 1.4, 1.6, 2.1, 3, 5, 8, 15, 30, 87, 89, 200, 1e4, 1e8])


@pytest.mark.parametrize("name", FORMS)
def test_extreme_values(compiled_kernel: str, name: str) -> None:
    """x is zero, so that an expert's bias is what its activation sees: each sees one gate and one up."""
    for shape, form in shapes_of(FORMS[name]).items():
        assert stays_near_at_extremes(form), shape


def stays_near_at_extremes(form: ExpertActivation) -> bool:
    values = torch.cat((EXTREMES, -EXTREMES))
    gate, up = torch.cartesian_prod(values, values).unbind(1)
    inner, hidden, count = 65, 64, len(gate)
    layout = expert_layout("int8", hidden, inner, form.gated)
    ups = [up] if form.gated else []
    dim = 2 if form.interleaved else 1
    first = torch.stack([*([gate] if form.gated else [gate + 0 * up]), *ups], dim=1)[:, :, None].expand(-1, -1, inner)
    first = first.transpose(1, 2) if dim == 2 else first
    first = first.reshape(count, -1).contiguous()
    biases = ExpertBiases(first, torch.zeros(count, hidden), list(range(count)))
    pairs = torch.zeros(count, 2, dtype=torch.int32)
    pairs[:, 1] = torch.arange(count)
    ours = torch.empty(1, count, hidden)
    experts(
        torch.zeros(1, hidden),
        pool := random_record(layout),
        layout,
        [0] * count,
        [Precision.FULL] * count,
        list(range(count + 1)),
        pairs,
        ours,
        form,
        biases,
    )
    down = reference.dequantize(pool, layout, 1, dtype=torch.float64).sum(1)  # all hidden units are the same
    exact = form(first.double())[:, :1] * down
    size = (gate.abs() * (up.abs() + 1 if form.gated else 1))[:, None].double() * down.abs()
    near = (ours[0].double() - exact).abs() <= 1e-3 * exact.abs() + 1e-6 * size
    return bool(near.all() and ours.isfinite().all())


WRONG = [
    ({"numbers": [0, 1]}, "number of every expert"),
    ({"numbers": [0, 1, 5]}, "has no biases"),
    ({"numbers": [0, -1, 2]}, "has no biases"),
    ({"first": torch.zeros(5, 2 * INNER - 1)}, "biases of gate_up_proj"),
    ({"down": torch.zeros(4, HIDDEN)}, "biases of down_proj"),
    ({"down": torch.zeros(5, HIDDEN, dtype=torch.bfloat16)}, "biases of down_proj"),
    ({"first": torch.zeros(2 * INNER, 5).T}, "contiguous"),
]


def test_wrong_biases_are_refused(compiled_kernel: str) -> None:
    form, x, layout = ExpertActivation("silu"), torch.zeros(3, HIDDEN), expert_layout("int4", HIDDEN, INNER)
    pool, rows = random_record(layout), torch.empty(3, 1, HIDDEN)
    pairs = torch.tensor([[t, 0] for t in range(3)], dtype=torch.int32)
    full, bounds = [Precision.FULL] * 3, [0, 1, 2, 3]
    for change, message in WRONG:
        biases = replace(random_biases(form), **change)
        with pytest.raises(ValueError, match=message):
            experts(x, pool, layout, [0, 0, 0], full, bounds, pairs, rows, form, biases)
