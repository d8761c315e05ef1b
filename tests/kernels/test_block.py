"""A block, or a layer, of one token in one native call: the bits of what it joins, or nothing."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
from torch import Tensor

from fate import kernels
from fate.core import Precision
from fate.kernels import fused, native
from fate.kernels.block import (
    BlockRun,
    PooledExperts,
    Router,
    SharedExpert,
    block_form,
    decoder_layer,
    half_form,
    sparse_block,
)
from fate.kernels.fused import Norm, PackedMatrix
from packed_records import expert_layout, matrix_layout, random_record

pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HIDDEN, INNER, EXPERTS, TOP_K, HEADS, DIM = 192, 80, 12, 4, 3, 64
SLOTS = [7, 3, -1, 0, 11, 2, 9, -1, 5, 1, 4]  # the last expert is beyond their end


class Dense:
    """A packed matrix as a module holds it."""

    def __init__(self, rows: int, cols: int, seed: int) -> None:
        self.layout, self.bias = matrix_layout("int4", rows, cols), None
        self.packed = random_record(self.layout, seed)


def packed(rows: int, cols: int, seed: int) -> PackedMatrix:
    return PackedMatrix(Dense(rows, cols, seed))


def values(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def pooled(codec: str = "int4") -> PooledExperts:
    layout = expert_layout(codec, HIDDEN, INNER)
    slot_bytes = -(-layout.record_bytes // 64) * 64
    pool = torch.zeros(EXPERTS * slot_bytes + 64, dtype=torch.uint8)
    pool = pool[-pool.data_ptr() % 64 :][: EXPERTS * slot_bytes]
    for slot in range(EXPERTS):
        pool[slot * slot_bytes :][: layout.record_bytes] = random_record(layout, slot)
    return PooledExperts(layout, kernels.SWIGLU, pool, slot_bytes, array("q", SLOTS))


def router(dtype: torch.dtype, normalize: bool, score_dtype: torch.dtype, scale: float) -> Router:
    return Router(values(EXPERTS, HIDDEN, seed=1, dtype=dtype, scale=scale), TOP_K, normalize, score_dtype)


def shared_expert(dtype: torch.dtype) -> SharedExpert:
    share = values(1, HIDDEN, seed=2, dtype=dtype, scale=0.1)
    return SharedExpert(packed(INNER, HIDDEN, 3), packed(INNER, HIDDEN, 4), packed(HIDDEN, INNER, 5), share)


def by_parts(x: Tensor, gate: Router, experts: PooledExperts, shared: SharedExpert | None) -> tuple[Tensor, list[int]]:
    """The same block out of its kernels, one after another; experts that are chosen but in no slot are not computed."""
    _, weights, indices = fused.route(x, *gate)
    rows = torch.zeros(1, TOP_K, HIDDEN)
    chosen = [(expert, rank) for rank, expert in enumerate(indices[0].tolist()) if weights[0, rank]]
    for expert, rank in chosen:
        slot = experts.slots[expert] if expert < len(experts.slots) else -1
        if slot >= 0:
            pair = torch.tensor([[0, rank]], dtype=torch.int32)
            offset = slot * experts.slot_bytes
            kernels.experts(x, experts.pool, experts.layout, [offset], [Precision.FULL], [0, 1], pair, rows)
    out = kernels.reduce_rows(rows, weights, x.dtype)
    if shared is not None:
        given = fused.gated_mlp(x, shared.gate, shared.up, shared.down)
        out = fused.add_gated(out, given, x, shared.share)
    return out, sorted(expert for expert, _ in chosen)


def in_memory(experts: list[int]) -> bool:
    return all(expert < len(SLOTS) and SLOTS[expert] >= 0 for expert in experts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize, float_scores, with_shared", [(False, False, True), (True, True, False)])
def test_a_block(dtype: torch.dtype, normalize: bool, float_scores: bool, with_shared: bool) -> None:
    experts, shared = pooled("int4" if with_shared else "int8"), shared_expert(dtype) if with_shared else None
    whole = fewer = 0
    for scale in (0.1, 3.0, 30.0):  # large logits leave experts a weight of zero
        gate = router(dtype, normalize, torch.float32 if float_scores else dtype, scale)
        form = block_form(gate, experts, shared, dtype)
        for seed in range(20):
            x = values(1, HIDDEN, seed=seed, dtype=dtype)
            expected, chosen = by_parts(x, gate, experts, shared)
            run = sparse_block(x, form, experts)
            assert (run is not None) == in_memory(chosen)
            if run is not None:
                assert torch.equal(run.out, expected)
                assert run.experts == chosen
                assert 0 < run.routed_s <= run.computed_s <= run.summed_s < 10
                whole, fewer = whole + 1, fewer + (len(chosen) < TOP_K)
    assert 10 < whole < 60
    assert fewer > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer(dtype: torch.dtype) -> None:
    experts, gate, shared = pooled(), router(dtype, False, dtype, 0.3), shared_expert(dtype)
    norms = tuple(Norm(values(HIDDEN, seed=6 + i, dtype=dtype) + 1, 1e-6, bool(i)) for i in range(2))
    matrices: Any = (*(packed(HEADS * DIM, HIDDEN, 20 + i) for i in range(3)), packed(HIDDEN, HEADS * DIM, 24))
    half = half_form((norms[0], norms[1]), matrices, (None, None), DIM, DIM**-0.5, dtype)
    block = block_form(gate, experts, shared, dtype)
    rotary = (values(1, 1, DIM, seed=30, dtype=dtype), values(1, 1, DIM, seed=31, dtype=dtype))
    given = {True: 0, False: 0}
    for seed in range(12):
        x = values(1, 1, HIDDEN, seed=seed, dtype=dtype)
        keys, other_keys = (values(1, HEADS, 9, DIM, seed=seed + 50, dtype=dtype) for _ in range(2))
        held, other_held = (values(1, HEADS, 9, DIM, seed=seed + 90, dtype=dtype) for _ in range(2))
        got = decoder_layer(x, half, block, rotary, (keys, held, 6), experts)
        residual, normed = fused.attention_half(
            x, (norms[0], norms[1]), matrices, (None, None), rotary, DIM, (other_keys, other_held, 6), DIM**-0.5
        )
        assert torch.equal(keys, other_keys)
        assert torch.equal(held, other_held)
        expected, chosen = by_parts(normed[0], gate, experts, shared)
        given[in_memory(chosen)] += 1
        if in_memory(chosen):
            assert isinstance(got, BlockRun)
            assert torch.equal(got.out, residual + expected)
            assert torch.equal(got.x, normed)
            assert got.experts == chosen
        else:
            assert not isinstance(got, BlockRun)
            assert torch.equal(got[0], residual)
            assert torch.equal(got[1], normed)
    assert min(given.values()) > 0


def test_a_cache_that_does_not_fit_is_refused() -> None:
    dtype = torch.float32
    experts, gate, norm = pooled(), router(dtype, False, dtype, 0.3), Norm(torch.ones(HIDDEN), 1e-6, False)
    matrices: Any = (*(packed(HEADS * DIM, HIDDEN, 20 + i) for i in range(3)), packed(HIDDEN, HEADS * DIM, 24))
    half = half_form((norm, norm), matrices, (None, None), DIM, DIM**-0.5, dtype)
    block, rotary = block_form(gate, experts, None, dtype), (torch.ones(1, 1, DIM), torch.zeros(1, 1, DIM))
    x, keys = values(1, 1, HIDDEN, seed=0, dtype=dtype), torch.zeros(1, HEADS, 9, DIM)
    for wrong, first in ((keys, 9), (keys[:, 1:], 3), (keys[..., 1:], 3), (keys.double(), 3), (keys.mT, 3)):
        for cache in ((wrong, keys, first), (keys, wrong, first)):
            with pytest.raises(ValueError, match="no room for position"):
                decoder_layer(x, half, block, rotary, cache, experts)
    with pytest.raises(ValueError, match="cos and sin"):
        decoder_layer(x, half, block, (rotary[0], rotary[1].double()), (keys, keys, 3), experts)


def test_what_does_not_fit_is_refused() -> None:
    dtype = torch.float32
    experts, gate, shared = pooled(), router(dtype, False, dtype, 0.3), shared_expert(dtype)
    form = block_form(gate, experts, shared, dtype)
    x = values(1, HIDDEN, seed=0, dtype=dtype)
    for wrong in (x[:, :-1], torch.cat([x, x]), x.expand(2, -1)[:, ::2]):
        with pytest.raises(ValueError, match="one token"):
            sparse_block(wrong, form, experts)
    with pytest.raises(ValueError, match="router's weight"):
        block_form(gate, experts, shared, torch.bfloat16)
    with pytest.raises(ValueError, match="share must be"):
        block_form(gate, experts, shared._replace(share=shared.share[:, 1:]), dtype)
    other = expert_layout("int4", HIDDEN + 64, INNER)
    for unfit in (experts._replace(slot_bytes=64), experts._replace(pool=experts.pool[4:])):
        with pytest.raises(ValueError, match="slots must hold a record each"):
            sparse_block(x, form, unfit)
    with pytest.raises(ValueError, match="router and experts"):
        sparse_block(x, block_form(gate, experts._replace(layout=other), shared, dtype), experts)
    with pytest.raises(ValueError, match="shared expert must fit"):
        sparse_block(x, block_form(gate, experts, shared._replace(down=packed(HIDDEN + 8, INNER, 1)), dtype), experts)
    with pytest.raises(IndexError, match="outside of the pool"):
        sparse_block(x, form, experts._replace(slots=array("q", [EXPERTS] * EXPERTS)))
