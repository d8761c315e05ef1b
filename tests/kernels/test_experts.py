from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fate.core import Precision
from fate.kernels import SWIGLU, experts, reference
from fate.store.format import RecordLayout
from packed_records import DEPTHS, expert_layout, random_record, relative_error

HIDDEN, INNER = 192, 100


@dataclass
class Case:
    """A pool of records and a routing of `tokens` to `top_k` of them each."""

    layout: RecordLayout
    pool: Tensor
    x: Tensor
    slot_offsets: list[int]
    pair_offsets: list[int]
    pairs: Tensor
    top_k: int

    def run(self, precisions: list[Precision]) -> Tensor:
        rows = torch.full((len(self.x), self.top_k, self.layout.matrices[0].cols), float("nan"))
        experts(self.x, self.pool, self.layout, self.slot_offsets, precisions, self.pair_offsets, self.pairs, rows)
        return rows

    def exact(self, precisions: list[Precision]) -> Tensor:
        rows = torch.full((len(self.x), self.top_k, self.layout.matrices[0].cols), float("nan"), dtype=torch.float64)
        reference.experts(
            self.x, self.pool, self.layout, self.slot_offsets, precisions, self.pair_offsets, self.pairs, rows, SWIGLU
        )
        return rows


def make_case(codec: str, tokens: int, experts: int = 5, top_k: int = 2, hidden: int = HIDDEN) -> Case:
    generator = torch.Generator().manual_seed(tokens)
    layout = expert_layout(codec, hidden, INNER)
    pool = torch.cat([random_record(layout, seed) for seed in range(experts)])
    x = torch.randn(tokens, hidden, generator=generator)
    # Uneven on purpose: some experts see many tokens, some one or none.
    odds = torch.rand(tokens, experts, generator=generator) * torch.arange(1, experts + 1)
    chosen = odds.topk(top_k).indices
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    return Case(
        layout,
        pool,
        x,
        [expert * layout.record_bytes for expert in range(experts)],
        [0, *counts.cumsum(0).tolist()],
        torch.stack((order // top_k, order % top_k), dim=1).int(),
        top_k,
    )


@pytest.mark.parametrize("codec, precision", DEPTHS)
def test_close_to_exact_arithmetic(kernel: str, codec: str, precision: Precision) -> None:
    for tokens in (1, 6, 50):
        case = make_case(codec, tokens)
        error = relative_error(case.run([precision] * 5), case.exact([precision] * 5))
        assert error < (0.01 if kernel != "torch" else 1e-5), f"{tokens} tokens"


@pytest.mark.parametrize("codec, precision", DEPTHS)
def test_the_same_bits_whatever_else_is_in_the_call(compiled_kernel: str, codec: str, precision: Precision) -> None:
    case = make_case(codec, tokens=60)
    torch.set_num_threads(2)
    together = case.run([precision] * 5)
    torch.set_num_threads(1)
    assert torch.equal(case.run([precision] * 5), together)
    alone = torch.empty_like(together)
    far = torch.cat((torch.zeros(64, dtype=torch.uint8), case.pool))
    for expert in range(5):
        pairs = case.pairs[case.pair_offsets[expert] : case.pair_offsets[expert + 1]]
        for first in range(0, len(pairs), 3):
            few = pairs[first : first + 3]
            slot = [64 + case.slot_offsets[expert]]
            experts(case.x, far, case.layout, slot, [precision], [0, len(few)], few.contiguous(), alone)
    assert torch.equal(alone, together)


def test_an_expert_with_more_pairs_than_one_pass_takes(compiled_kernel: str) -> None:
    case = make_case("int4", tokens=700, experts=2, top_k=2, hidden=64)
    rows = case.run([Precision.FULL] * 2)
    some = [0, 511, 512, 513, 699]
    for token in some:
        for rank in range(2):
            where = (case.pairs == torch.tensor([token, rank])).all(1).nonzero().item()
            expert = 0 if where < case.pair_offsets[1] else 1
            one = torch.empty(700, 2, 64)
            slot = [case.slot_offsets[expert]]
            pair = case.pairs[where : where + 1].contiguous()
            experts(case.x, case.pool, case.layout, slot, [Precision.FULL], [0, 1], pair, one)
            assert torch.equal(one[token, rank], rows[token, rank])
    assert rows.isfinite().all()


def test_precisions_may_differ_within_a_call(kernel: str) -> None:
    case = make_case("int4", tokens=20)
    mixed = [Precision.INT2, Precision.FULL, Precision.INT2, Precision.FULL, Precision.INT2]
    rows, low, full = (case.run(p) for p in (mixed, [Precision.INT2] * 5, [Precision.FULL] * 5))
    for expert, precision in enumerate(mixed):
        token, rank = case.pairs[case.pair_offsets[expert] : case.pair_offsets[expert + 1]].long().unbind(1)
        expected = low if precision is Precision.INT2 else full
        assert torch.equal(rows[token, rank], expected[token, rank])
    assert not torch.equal(low, full)


def test_rows_of_other_pairs_are_left_alone(kernel: str) -> None:
    case = make_case("int4", tokens=4)
    rows = torch.full((4, 2, HIDDEN), 7.0)
    pairs = torch.tensor([[2, 1]], dtype=torch.int32)
    experts(case.x, case.pool, case.layout, [0], [Precision.FULL], [0, 1], pairs, rows)
    touched = (rows != 7.0).any(-1)
    assert touched.nonzero().tolist() == [[2, 1]]


def test_half_precision_inputs_are_read_exactly(kernel: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        case = make_case("int4", tokens=12)
        half = case.x.to(dtype)
        case.x = half.float()
        expected = case.run([Precision.FULL] * 5)
        case.x = half
        assert torch.equal(case.run([Precision.FULL] * 5), expected), dtype


def test_raw_records(kernel: str) -> None:
    full = [Precision.FULL] * 5
    for codec, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("bf16", torch.float32)):
        case = make_case(codec, tokens=20)
        case.x = case.x.to(dtype)
        error = relative_error(case.run(full), case.exact(full))
        assert error < (1e-5 if dtype == torch.float32 else 0.01), (codec, dtype)


WRONG = [
    ({"pairs": torch.tensor([[4, 0]], dtype=torch.int32)}, "outside of rows"),
    ({"pairs": torch.tensor([[0, 2]], dtype=torch.int32)}, "outside of rows"),
    ({"pairs": torch.tensor([[0, -1]], dtype=torch.int32)}, "outside of rows"),
    ({"pairs": torch.tensor([[0, 0]])}, "contiguous int32"),
    ({"pair_offsets": [0, 2]}, "outside of pairs"),
    ({"pair_offsets": [0]}, "E \\+ 1"),
    ({"slot_offsets": [1 << 30]}, "outside of the pool"),
    ({"slot_offsets": [-4096]}, "outside of the pool"),
    ({"slot_offsets": [8]}, "64-byte aligned"),
    ({"rows": torch.empty(4, 2, HIDDEN, dtype=torch.float64)}, "contiguous float32"),
    ({"rows": torch.empty(3, 2, HIDDEN)}, "contiguous float32"),
    ({"x": torch.empty(4, HIDDEN + 1)}, "this expert takes"),
]


def test_wrong_calls_are_refused(compiled_kernel: str) -> None:
    case = make_case("int4", tokens=4)
    call = {
        "x": case.x,
        "pool": case.pool,
        "layout": case.layout,
        "slot_offsets": [0],
        "precisions": [Precision.FULL],
        "pair_offsets": [0, 1],
        "pairs": torch.tensor([[0, 0]], dtype=torch.int32),
        "rows": torch.empty(4, 2, HIDDEN),
    }
    experts(**call)
    for change, message in WRONG:
        with pytest.raises(ValueError, match=message):
            experts(**{**call, **change})


def test_matrices_that_do_not_make_an_expert_are_refused(compiled_kernel: str) -> None:
    layout = RecordLayout("int4", expert_layout("int4", HIDDEN, INNER).matrices[::-1])
    pairs = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="an expert needs matrices"):
        experts(
            torch.randn(1, INNER),
            random_record(layout),
            layout,
            [0],
            [Precision.FULL],
            [0, 1],
            pairs,
            torch.empty(1, 1, INNER),
        )
