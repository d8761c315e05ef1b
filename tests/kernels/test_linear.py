from __future__ import annotations

import ctypes
import mmap
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fate.core import Precision
from fate.kernels import linear, native, reference
from fate.store.dtypes import RAW_DTYPES
from fate.store.format import GROUP, RecordLayout
from packed_records import DEPTHS, matrix_layout, random_record, relative_error

# Tails of the packing: 0, 1, 2, 3, 6, 11, 13 and 15 groups beyond the last whole chunk, partial groups, rows below and
# beyond a tile.
SHAPES = [
    (1, 64),
    (3, 100),
    (64, 128),
    (3, 192),
    (65, 704),
    (64, 1408),
    (2816, 64),
    (130, 2048),
    (7, 2880),
    (1, 2048),
    (9, 1984),
]
_PROT_NONE = 0
TOKENS = [1, 2, 3, 4, 8, 9, 17, 67, 130]


def whole_activations(tokens: int, cols: int) -> Tensor:
    """Whole numbers with 127 in every group: quantizing them to int8 loses nothing."""
    x = torch.randint(-127, 128, (tokens, cols), generator=torch.Generator().manual_seed(tokens + cols)).float()
    x[:, ::GROUP] = 127.0
    return x


@cache
def exact_products(
    codec: str, precision: Precision, rows: int, cols: int
) -> tuple[RecordLayout, Tensor, list[tuple[Tensor, Tensor]]]:
    """(layout, record, (x, its product) for each of TOKENS)"""
    layout = matrix_layout(codec, rows, cols)
    record = random_record(layout, whole=True)
    weights = reference.dequantize(record, layout, 0, precision, torch.float64)
    inputs = [whole_activations(tokens, cols) for tokens in TOKENS]
    return layout, record, [(x, (x.double() @ weights.T).float()) for x in inputs]


@pytest.mark.parametrize("codec, precision", DEPTHS)
def test_exact_where_arithmetic_is_exact(kernel: str, codec: str, precision: Precision) -> None:
    for rows, cols in SHAPES:
        layout, record, products = exact_products(codec, precision, rows, cols)
        for x, expected in products:
            got, what = linear(x, record, layout, 0, precision), f"{rows} x {cols}, {len(x)} tokens"
            if kernel == "torch":  # multiplies dequantized weights, so the slope's bits take part in every product
                assert relative_error(got, expected) < 1e-6, what
            else:
                assert torch.equal(got, expected), what


@cache
def near_product(
    codec: str, precision: Precision, rows: int, cols: int, dtype: torch.dtype
) -> tuple[RecordLayout, Tensor, Tensor, Tensor]:
    """(layout, record, x, its product in float64)"""
    layout = matrix_layout(codec, rows, cols)
    record = random_record(layout)
    x = torch.randn(17, cols, generator=torch.Generator().manual_seed(1)).to(dtype)
    return layout, record, x, reference.linear(x, record, layout, 0, precision, dtype=torch.float64)


@pytest.mark.parametrize("codec, precision", DEPTHS)
def test_within_a_percent_of_exact_arithmetic(kernel: str, codec: str, precision: Precision) -> None:
    large = {"int4": torch.bfloat16, "int8": torch.float16}[codec]  # the small matrix meets every dtype
    small = [(64, 704, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    for rows, cols, dtype in (*small, (2816, 2048, large)):
        layout, record, x, exact = near_product(codec, precision, rows, cols, dtype)
        out = linear(x, record, layout, 0, precision)
        assert out.dtype == dtype
        assert relative_error(out, exact) < 0.01, (rows, cols, dtype)


@pytest.mark.parametrize("codec, precision", DEPTHS)
def test_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads(
    compiled_kernel: str, codec: str, precision: Precision
) -> None:
    for cols in (100, 1408):
        layout = matrix_layout(codec, 200, cols)
        record = random_record(layout)
        x = torch.randn(140, cols, generator=torch.Generator().manual_seed(2))
        torch.set_num_threads(2)
        batch = linear(x, record, layout, 0, precision)
        torch.set_num_threads(1)
        assert torch.equal(linear(x, record, layout, 0, precision), batch)
        for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 33):
            few = linear(x[5 : 5 + tokens], record, layout, 0, precision)
            assert torch.equal(few, batch[5 : 5 + tokens]), f"{cols} columns, {tokens} tokens"


def test_more_tokens_than_are_quantized_at_a_time(compiled_kernel: str) -> None:
    layout = matrix_layout("int4", 9, 64)
    record = random_record(layout)
    x = torch.randn(1100, 64)
    whole = linear(x, record, layout)
    assert torch.equal(whole, torch.cat([linear(x[:600], record, layout), linear(x[600:], record, layout)]))


def test_half_precision_is_float32_rounded_once(kernel: str) -> None:
    layout = matrix_layout("int4", 70, 192)
    record = random_record(layout)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(9, 192).to(dtype)
        assert torch.equal(linear(x, record, layout), linear(x.float(), record, layout).to(dtype)), dtype


def test_bias_is_added_in_float32(kernel: str) -> None:
    layout = matrix_layout("int8", 130, 64)
    record = random_record(layout)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-3)):
        x, bias = torch.randn(3, 64).to(dtype), torch.randn(130).to(dtype)
        expected = (linear(x.float(), record, layout) + bias.float()).to(dtype)
        assert relative_error(linear(x, record, layout, bias=bias), expected) < bound, dtype
        if kernel != "torch":
            assert torch.equal(linear(x, record, layout, bias=bias), expected), dtype


def test_int2_does_not_depend_on_the_second_half(kernel: str) -> None:
    layout = matrix_layout("int4", 33, 1408)
    record = random_record(layout)
    x = torch.randn(12, 1408)
    before = [linear(x[:n], record, layout, 0, Precision.INT2) for n in (1, 12)]
    record[layout.split :] ^= 0xFF
    after = [linear(x[:n], record, layout, 0, Precision.INT2) for n in (1, 12)]
    assert all(map(torch.equal, before, after))
    assert not torch.equal(linear(x, record, layout), before[1])


@pytest.mark.parametrize("codec, precision", DEPTHS)
def test_no_byte_beyond_the_record_is_read(compiled_kernel: str, codec: str, precision: Precision) -> None:
    """The record ends where an unreadable page begins: a read past it kills the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    for cols in (64, 100, 192, 704, 2048):
        layout = matrix_layout(codec, 21, cols)
        size = -(-layout.record_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, size + mmap.PAGESIZE)
        view = torch.frombuffer(memory, dtype=torch.uint8)
        guard = ctypes.c_void_p(view.data_ptr() + size)
        assert libc.mprotect(guard, mmap.PAGESIZE, _PROT_NONE) == 0
        record = view[size - layout.record_bytes : size]
        record.copy_(random_record(layout))
        for tokens in (1, 4, 40):
            assert linear(torch.randn(tokens, cols), record, layout, 0, precision).isfinite().all()


def test_a_bad_activation_shows(kernel: str) -> None:
    layout = matrix_layout("int4", 5, 128)
    for bad in (float("nan"), float("inf")):
        x = torch.randn(3, 128)
        x[1, 70] = bad
        out = linear(x, random_record(layout), layout)
        assert not out[1].isfinite().any(), bad
        assert out[[0, 2]].isfinite().all(), bad


def test_activations_of_any_magnitude(kernel: str) -> None:
    layout = matrix_layout("int4", 64, 128)
    record = random_record(layout)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(3))
    for scale in (0.0, 1e-35, 1e-20, 1e20):
        out = linear(x * scale, record, layout)
        assert out.isfinite().all(), scale
        if scale >= 1e-20:
            assert relative_error(out / scale, linear(x, record, layout)) < 1e-3, scale
        else:
            assert out.abs().max() <= 1e-29, scale


@pytest.mark.parametrize("codec", ["bf16", "fp16", "fp32"])
def test_raw_records_are_torchs_own_product(kernel: str, codec: str) -> None:
    layout = matrix_layout(codec, 30, 70)
    record = random_record(layout)
    dtype = RAW_DTYPES[codec]
    x, bias = torch.randn(5, 70).to(dtype), torch.randn(30).to(dtype)
    weights = record[: 30 * 70 * dtype.itemsize].view(dtype).view(30, 70)
    assert torch.equal(linear(x, record, layout, bias=bias), F.linear(x, weights, bias))
    exact = F.linear(x.double(), weights.double())
    assert relative_error(linear(x.float(), record, layout), exact) < 1e-6


def test_no_tokens(kernel: str) -> None:
    layout = matrix_layout("int4", 5, 64)
    assert linear(torch.empty(0, 64), random_record(layout), layout).shape == (0, 5)


def test_activations_that_are_not_contiguous(compiled_kernel: str) -> None:
    layout = matrix_layout("int4", 5, 64)
    record = random_record(layout)
    x = torch.randn(64, 7).T
    assert torch.equal(linear(x, record, layout), linear(x.contiguous(), record, layout))


def test_wrong_calls_are_refused(kernel: str) -> None:
    layout = matrix_layout("int4", 5, 64)
    record = random_record(layout)
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match=r"takes \[tokens, 64\]"):
        linear(torch.randn(2, 65), record, layout)
    with pytest.raises(ValueError, match="at least"):
        linear(x, record[:-64], layout)
    with pytest.raises(ValueError, match="contiguous uint8"):
        linear(x, record.repeat(2)[::2], layout)
    with pytest.raises(ValueError, match="bias must be"):
        linear(x, record, layout, bias=torch.randn(4))
    eight = matrix_layout("int8", 5, 64)
    with pytest.raises(ValueError, match="only at FULL"):
        linear(x, random_record(eight), eight, 0, Precision.INT2)


def test_float64_activations_are_refused(compiled_kernel: str) -> None:
    layout = matrix_layout("int4", 5, 64)
    with pytest.raises(ValueError, match="use float32, bfloat16 or float16"):
        linear(torch.randn(2, 64, dtype=torch.float64), random_record(layout), layout)


def test_a_section_outside_of_the_record_is_refused() -> None:
    record = native.record(matrix_layout("int4", 5, 64))
    assert type(record).make(False, 4096, [(4, 64, 64, 128, 192)]) is not None
    for high, affine, low in ((4096, 128, 192), (-1, 128, 192), (64, 4090, 192), (64, 62, 192), (64, 128, 4064)):
        with pytest.raises(ValueError, match="outside of its record"):
            type(record).make(False, 4096, [(4, 64, high, affine, low)])
