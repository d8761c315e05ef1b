"""Attention of one token over a KV cache: against float64, in every form a cache has."""

import pytest
import torch
import torch.nn.functional as F

from fate import kernels
from fate.kernels import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


def tensors(batch, heads, kv_heads, length, key_dim, value_dim, dtype, room=5):
    """Query, and keys and values as views of a larger buffer."""
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(batch, heads, 1, key_dim, generator=generator).to(dtype)
    keys, values = (
        torch.randn(batch, kv_heads, length + room, dim, generator=generator).to(dtype)[:, :, :length]
        for dim in (key_dim, value_dim)
    )
    return query, keys, values


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),
        (1, 4, 4, 33, 64, 64),
        (2, 6, 2, 7, 24, 40),
        (1, 16, 2, 300, 128, 128),
        (3, 5, 1, 2, 17, 3),
        (1, 35, 1, 1100, 40, 24),  # more heads of a key-value head than one pass takes
        (1, 2, 1, 9000, 32, 32),  # blocks of more than one step
    ],
)
def test_against_float64(shape, compiled_kernel):
    for dtype, tolerance in TOLERANCE.items():
        query, keys, values = tensors(*shape, dtype)
        exact = F.scaled_dot_product_attention(
            query.double(), keys.double(), values.double(), scale=0.3, enable_gqa=True
        ).transpose(1, 2)
        out = kernels.attend(query, keys, values, 0.3)
        assert out.dtype == dtype
        assert out.shape == exact.shape
        assert (out.double() - exact).norm() <= tolerance * exact.norm(), dtype


@pytest.mark.parametrize("length", [200, 1500, 9000])
def test_the_same_bits_from_any_number_of_threads_and_rows(length):
    query, keys, values = tensors(3, 8, 2, length, 64, 64, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [kernels.attend(query[r : r + 1], keys[r : r + 1], values[r : r + 1], 0.1) for r in range(3)]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(kernels.attend(query, keys, values, 0.1), torch.cat(alone))
    finally:
        torch.set_num_threads(before)


def test_the_same_bits_from_every_instruction_set():
    query, keys, values = tensors(1, 10, 2, 700, 70, 50, torch.float16)
    results = []
    for name in native.available()[:-1]:
        with native.selected(name):
            results.append(kernels.attend(query, keys, values, 0.1))
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_is_not_a_number_shows():
    query, keys, values = tensors(1, 2, 2, 40, 16, 16, torch.float32)
    query[0, 1, 0, 3] = float("nan")
    out = kernels.attend(query, keys, values, 0.1)
    assert torch.isfinite(out[0, 0, 0]).all()
    assert out[0, 0, 1].isnan().all()


def test_large_scores_do_not_overflow():
    query, keys, values = tensors(1, 2, 2, 9, 8, 8, torch.float32)
    assert torch.isfinite(kernels.attend(query * 1e4, keys, values, 1.0)).all()
