"""Random calls of `linear` and `experts` against `kernels/reference.py` in float64, which starts from the same
activations in int8: shapes, groups, token counts, precisions, dtypes, activations, biases, and every instruction set
this machine runs.

>>> python -m kernel_fuzz 5000 1    # rounds, first seed
"""

from __future__ import annotations

import sys
from collections import Counter

import torch
from torch import Tensor

from fate.kernels import ExpertActivation, ExpertBiases, experts, linear, native, reference
from fate.kernels.activation import KINDS
from packed_records import DEPTHS, expert_layout, matrix_layout, random_record

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 0.005, torch.float16: 0.001}


class Draw:
    """Random choices of one round."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def between(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def of(self, choices: tuple) -> object:
        return choices[self.between(0, len(choices) - 1)]

    def chance(self, percent: int) -> bool:
        return self.between(1, 100) <= percent

    def size(self, most: int) -> int:
        """Often beside a multiple of 64."""
        if self.chance(50):
            return self.between(1, most)
        return min(most, max(1, 64 * self.between(1, 8 if self.chance(70) else 35) + self.between(-1, 1)))

    def tokens(self) -> int:
        return self.between(1, 9) if self.chance(60) else self.between(10, 80) if self.chance(90) else 600

    def values(self, *shape: int) -> Tensor:
        """Normal, with some zeros and some much larger; a row may be all zeros."""
        values = torch.randn(*shape, generator=self.generator)
        odds = torch.rand(*shape, generator=self.generator)
        values = torch.where(odds < 0.02, 20 * values, torch.where(odds < 0.08, 0 * values, values))
        return 0 * values if self.chance(2) else values


def fuzz(rounds: int, first_seed: int, kernel: str | None = None) -> Counter[str]:
    """Calls made of each kind; AssertionError with the seed where one is wrong. kernel: this one only."""
    made: Counter[str] = Counter()
    before = native.active().name
    try:
        for seed in range(first_seed, first_seed + rounds):
            draw = Draw(seed)
            name = kernel or str(draw.of(tuple(k for k in native.available() if k != "torch")))
            native.select(name)
            call = fuzz_experts if draw.chance(60) else fuzz_linear
            wrong = call(draw)
            assert not wrong, f"seed {seed}, {name}, {call.__name__}: {wrong}"
            made[f"{name} {call.__name__}"] += 1
    finally:
        native.select(before)
    return made


def fuzz_linear(draw: Draw) -> str:
    codec, precision = draw.of(tuple(DEPTHS))
    dtype = draw.of(DTYPES)
    layout = matrix_layout(codec, draw.size(200), draw.size(2300))
    spec = layout.matrices[0]
    packed = random_record(layout, draw.between(0, 1 << 30))
    x = draw.values(draw.tokens(), spec.cols).to(dtype)
    bias = draw.values(spec.rows).to(dtype) if draw.chance(50) else None
    ours = linear(x, packed, layout, 0, precision, bias).double()
    rounded = _to_int8(x.float()).double()
    exact = reference.linear(rounded, packed, layout, 0, precision, bias, torch.float64)
    weights = reference.dequantize(packed, layout, 0, precision, torch.float64).abs()
    bound = 1e-5 * (rounded.abs() @ (weights + weights.max()).T) + _ROUNDING[dtype] * exact.abs() + 1e-6
    return _beyond(ours, exact, bound, f"{codec} {precision.name} {dtype} {tuple(x.shape)} -> {spec.rows}")


def fuzz_experts(draw: Draw) -> str:
    codec, precision = draw.of(tuple(DEPTHS))
    dtype, form = draw.of(DTYPES), random_form(draw)
    count, top_k, tokens = draw.between(1, 4), draw.between(1, 3), draw.tokens()
    layout = expert_layout(
        codec, *(draw.size(most) for most in draw.of(((300, 200), (1500, 60), (60, 1500)))), form.gated
    )
    hidden = layout.matrices[0].cols
    pool = torch.cat([random_record(layout, draw.between(0, 1 << 30)) for _ in range(count)])
    x = draw.values(tokens, hidden).to(dtype)
    biases = None
    if draw.chance(50):
        kept = count + draw.between(0, 2)
        first, down = (0.5 * draw.values(kept, spec.rows).to(draw.of(DTYPES)) for spec in layout.matrices)
        numbers = [draw.between(0, kept - 1) for _ in range(count)]
        biases = ExpertBiases(first, down.to(first.dtype), numbers)
    chosen = torch.randint(0, count + 1, (tokens, top_k), generator=draw.generator)  # the last: none
    pairs = [(chosen == expert).nonzero().int() for expert in range(count)]
    bounds = [0, *torch.tensor([len(p) for p in pairs]).cumsum(0).tolist()]
    offsets, depths = [expert * layout.record_bytes for expert in range(count)], [precision] * count
    rows = torch.full((tokens, top_k, hidden), float("nan"))
    flat = torch.cat(pairs).contiguous()
    experts(x, pool, layout, offsets, depths, bounds, flat, rows, form, biases)
    what = f"{codec} {precision.name} {dtype} {form} {tokens} tokens, {hidden} x {layout.matrices[1].cols}"
    for expert, offset in enumerate(offsets):
        token, rank = pairs[expert].long().unbind(1)
        up, down = (reference.dequantize(pool[offset:], layout, i, precision, torch.float64) for i in (0, 1))
        added = (None, None) if biases is None else biases.of(expert, torch.float64)
        exact, bound = _expert(_to_int8(x[token].float()).double(), up, down, added, form)
        if wrong := _beyond(rows[token, rank].double(), exact, bound, what):
            return wrong
        rows[token, rank] = float("nan")
    return "" if bool(rows.isnan().all()) else f"rows of no pair written: {what}"


def _expert(
    x: Tensor, up: Tensor, down: Tensor, biases: tuple[Tensor | None, Tensor | None], form: ExpertActivation
) -> tuple[Tensor, Tensor]:
    """(what an expert makes of activations already in int8, how far off float32 sums and 15 bits between its matrices
    may be), float64 [tokens, hidden]."""
    sums = torch.nn.functional.linear(x, up, biases[0])
    sizes = x.abs() @ (up.abs() + up.abs().max()).T + (0.01 if biases[0] is None else biases[0].abs() + 0.01)
    if not form.gated:
        gates, ups = sizes, torch.ones_like(sizes)
    elif form.interleaved:
        gates, ups = sizes[:, ::2], sizes[:, 1::2]
    else:
        gates, ups = sizes.chunk(2, dim=1)
    between = form(sums)
    off = 1e-5 * gates * (gates + 1 if form.kind == "relu2" else 1) * (ups + form.up_offset)
    off = off + 3e-5 * _of_groups(between.abs() + off)
    exact = torch.nn.functional.linear(between, down, biases[1])
    bound = off @ down.abs().T + 1e-5 * (between.abs() @ (down.abs() + down.abs().max()).T + exact.abs()) + 1e-6
    return exact, bound


def random_form(draw: Draw) -> ExpertActivation:
    kind = str(draw.of(KINDS))
    if kind != "silu_softcap" and draw.chance(30):
        return ExpertActivation(kind, gated=False, alpha=1.702 if kind == "silu" and draw.chance(50) else 1.0)
    limits = {"gate_max": draw.between(1, 4) / 2, "up_limit": draw.between(1, 4) / 2} if draw.chance(60) else {}
    if limits and kind == "silu":
        limits |= {"alpha": 1.702, "up_offset": 1.0} if draw.chance(50) else {"act_max": 0.7}
    return ExpertActivation(kind, interleaved=draw.chance(40), **limits)


def _to_int8(x: Tensor) -> Tensor:
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % 64)).unflatten(1, (-1, 64))
    most = groups.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(most, 127.0) / most  # a number over a tensor would be its reciprocal times the number
    codes = torch.where(most < 1e-30, 0.0, (groups * inverse).round())
    return (codes * (most / 127.0)).flatten(1)[:, : x.shape[1]]


def _of_groups(x: Tensor) -> Tensor:
    """Every value's share of an error: the largest magnitude of its group, float64."""
    groups = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % 64)).unflatten(1, (-1, 64))
    return groups.abs().amax(-1, keepdim=True).expand_as(groups).flatten(1)[:, : x.shape[1]]


def _beyond(ours: Tensor, exact: Tensor, bound: Tensor, what: str) -> str:
    excess = (ours - exact).abs() / bound
    if bool((excess <= 1).all()):
        return ""
    at = int(excess.nan_to_num(1e9).argmax())
    return f"{ours.flatten()[at]:.6g} for {exact.flatten()[at]:.6g}, {excess.max():.3g} times the bound: {what}"


def main() -> None:
    rounds, seed = int(sys.argv[1]), int(sys.argv[2])
    made = fuzz(rounds, seed)
    print(", ".join(f"{name} {count}" for name, count in sorted(made.items())))


if __name__ == "__main__":
    main()
