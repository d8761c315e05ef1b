from __future__ import annotations

import pytest
import torch

from fate.kernels import gather_rows, reduce_rows, reference
from packed_records import matrix_layout, random_record

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("weights_dtype", [*DTYPES, torch.float64])
def test_reduce_sums_in_rank_order(kernel: str, weights_dtype: torch.dtype) -> None:
    for tokens, top_k, hidden in ((1, 1, 5), (3, 4, 1030), (40, 8, 2048)):
        rows, weights = torch.randn(tokens, top_k, hidden), torch.rand(tokens, top_k).to(weights_dtype)
        total = torch.zeros(tokens, hidden)
        for rank in range(top_k):
            total += weights[:, rank, None].float() * rows[:, rank]
        for dtype in DTYPES:
            assert torch.equal(reduce_rows(rows, weights, dtype), total.to(dtype)), (tokens, top_k, hidden, dtype)


def test_reduce_does_not_read_rows_of_weight_zero(kernel: str) -> None:
    rows, weights = torch.randn(3, 4, 70), torch.rand(3, 4)
    weights[0, 1] = weights[2, 0] = weights[2, 3] = 0.0
    clean = torch.where(weights[..., None] == 0, torch.zeros_like(rows), rows)
    dirty = torch.where(weights[..., None] == 0, torch.full_like(rows, float("nan")), rows)
    assert torch.equal(reduce_rows(dirty, weights, torch.float32), reduce_rows(clean, weights, torch.float32))


def test_reduce_is_the_same_on_any_number_of_threads(kernel: str) -> None:
    rows, weights = torch.randn(64, 8, 1500), torch.rand(64, 8)
    torch.set_num_threads(2)
    two = reduce_rows(rows, weights, torch.bfloat16)
    torch.set_num_threads(1)
    assert torch.equal(reduce_rows(rows, weights, torch.bfloat16), two)


def test_reduce_refuses_shapes_that_do_not_fit(kernel: str) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        reduce_rows(torch.zeros(2, 3, 4), torch.zeros(3, 2), torch.float32)


@pytest.mark.parametrize("codec", ["int4", "int8", "bf16", "fp32"])
def test_gather_is_dequantized_rows(kernel: str, codec: str) -> None:
    ids = torch.tensor([49, 0, 7, 7, 31])
    for cols in (64, 100, 192, 704, 2048):
        layout = matrix_layout(codec, 50, cols)
        record = random_record(layout)
        expected = reference.dequantize(record, layout, 0)[ids]
        for dtype in DTYPES:
            got = gather_rows(record, layout, 0, ids, dtype)
            assert torch.equal(got, expected.to(dtype)), f"{cols} columns, {dtype}"


def test_gather_of_nothing_and_of_many(kernel: str) -> None:
    layout = matrix_layout("int4", 50, 704)
    record = random_record(layout)
    assert gather_rows(record, layout, 0, torch.empty(0, dtype=torch.int64), torch.float32).shape == (0, 704)
    ids = torch.arange(300) % 50
    expected = reference.dequantize(record, layout, 0)[ids]
    assert torch.equal(gather_rows(record, layout, 0, ids, torch.float32), expected)


def test_gather_refuses_ids_outside_of_the_matrix(compiled_kernel: str) -> None:
    layout = matrix_layout("int4", 50, 64)
    for bad in (50, -1):
        with pytest.raises(IndexError, match="row id"):
            gather_rows(random_record(layout), layout, 0, torch.tensor([0, bad]), torch.float32)
