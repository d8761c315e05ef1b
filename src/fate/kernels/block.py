"""A sparse block of one token whose experts are in memory (router, experts, their sum, and the shared expert where
there is one), or a whole decoder layer with such a block, in one native call. `models/fused/` knows which modules of a
model these are.

What comes out is what `fused.attention_half`, `fused.route`, `experts`, `reduce_rows`, `fused.gated_mlp` and
`fused.add_gated` give, bit for bit. The extension must be there.
"""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fate.kernels import native, threads
from fate.kernels.activation import ExpertActivation
from fate.kernels.fused import HeadNorms, Norm, PackedMatrix, head_norm_addresses, rotary_address
from fate.kernels.native import DTYPE_CODES
from fate.store.format import RecordLayout


class Router(NamedTuple):
    """A softmax router: see `fused.route`. weight: [experts, hidden], contiguous."""

    weight: Tensor
    top_k: int
    normalize: bool
    score_dtype: torch.dtype


class SharedExpert(NamedTuple):
    """down(silu(gate(x)) * up(x)), which counts sigmoid(x share^T) times. share: [1, hidden], contiguous."""

    gate: PackedMatrix
    up: PackedMatrix
    down: PackedMatrix
    share: Tensor


class PooledExperts(NamedTuple):
    """Experts in slots of `slot_bytes` in pool, uint8. slots: of each expert the slot that holds it whole, or -1; those
    beyond its end are in none."""

    layout: RecordLayout
    activation: ExpertActivation
    pool: Tensor
    slot_bytes: int
    slots: array[int]


class BlockRun(NamedTuple):
    """x, out: the block's input and what was asked for, of the call's shape. experts: those of a weight that is not
    zero, ascending. Seconds since the call began: when they were known, when computed, when summed."""

    x: Tensor
    out: Tensor
    experts: list[int]
    routed_s: float
    computed_s: float
    summed_s: float


Form = tuple[Any, ...]  # what the extension is told of a block that is the same for all calls


class HalfForm(NamedTuple):
    """The same of the first half of a layer, and its heads of keys and values."""

    form: Form
    kv_heads: int
    head_dim: int


def block_form(router: Router, experts: PooledExperts, shared: SharedExpert | None, dtype: torch.dtype) -> Form:
    """Of a block of activations of `dtype`; good for as long as the tensors named stay where they are."""
    weight = router.weight
    if weight.dtype != dtype or not weight.is_contiguous():
        raise ValueError(f"a router's weight must be contiguous {dtype} [experts, hidden], not {weight.dtype}")
    packed, share = None, 0
    if shared is not None:
        if shared.share.shape != (1, weight.shape[1]) or shared.share.dtype != dtype:
            raise ValueError(f"share must be {dtype} [1, {weight.shape[1]}], not {tuple(shared.share.shape)}")
        packed = shared.gate.address(dtype), shared.up.address(dtype), shared.down.address(dtype)
        share = shared.share.data_ptr()
    return (
        weight.data_ptr(),
        share,
        (*weight.shape, router.top_k, router.normalize, DTYPE_CODES[router.score_dtype]),
        native.record(experts.layout),
        native.activation(experts.activation),
        packed,
    )


def half_form(
    norms: tuple[Norm, Norm],
    matrices: tuple[PackedMatrix, PackedMatrix, PackedMatrix, PackedMatrix],
    head_norms: HeadNorms,
    head_dim: int,
    scale: float,
    dtype: torch.dtype,
) -> HalfForm:
    """Of a layer's first half, as `fused.attention_half` takes it; good for as long as the tensors stay where they
    are."""
    addresses = tuple(norm.address(dtype) for norm in norms), tuple(matrix.address(dtype) for matrix in matrices)
    form = *addresses, head_norm_addresses(head_norms, dtype), head_dim, scale
    return HalfForm(form, matrices[1].rows // head_dim, head_dim)


def sparse_block(x: Tensor, form: Form, experts: PooledExperts) -> BlockRun | None:
    """The block of one token, x [..., hidden], contiguous; None, and nothing was computed, where an expert that the
    router chooses is in no slot. Packed codecs only."""
    _check_one_token(x, form)
    out = torch.empty_like(x)
    ran = native.extension().sparse_block(
        form, _residency(experts), x.data_ptr(), DTYPE_CODES[x.dtype], out.data_ptr(), threads.count()
    )
    return None if ran is None else BlockRun(x, out, *ran)


def decoder_layer(
    x: Tensor,
    half: HalfForm,
    block: Form,
    rotary: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor, int],
    experts: PooledExperts,
) -> BlockRun | tuple[Tensor, Tensor]:
    """A layer of one token, x [..., hidden], contiguous: attention's half, its norm's block, and the sum of both. Where
    an expert that the router chooses is in no slot: (x + attention, its norm), each of x's shape. rotary, cache: see
    `fused.attention_half`."""
    _check_one_token(x, block)
    keys, values, first = cache
    shape = (1, half.kv_heads, keys.shape[2], half.head_dim)
    for held in (keys, values):
        if held.shape != shape or held.dtype != x.dtype or held.stride(3) != 1 or not 0 <= first < shape[2]:
            raise ValueError(f"no room for position {first} of {x.dtype} {shape} in {held.dtype} {tuple(held.shape)}")
    residual, normed, out = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    ran = native.extension().decoder_layer(
        half.form,
        block,
        rotary_address(rotary, x.dtype, 1),
        (keys.data_ptr(), keys.stride()[:3], values.data_ptr(), values.stride()[:3], first + 1),
        _residency(experts),
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        (residual.data_ptr(), normed.data_ptr(), out.data_ptr()),
        threads.count(),
    )
    return (residual, normed) if ran is None else BlockRun(normed, out, *ran)


def _check_one_token(x: Tensor, form: Form) -> None:
    if x.numel() != form[2][1] or not x.is_contiguous():
        raise ValueError(f"x has shape {tuple(x.shape)}: this block takes one token of {form[2][1]}")


def _residency(experts: PooledExperts) -> tuple[int, int, int, int, int]:
    pool, slots = experts.pool, experts.slots
    return pool.data_ptr(), experts.slot_bytes, pool.numel() // experts.slot_bytes, slots.buffer_info()[0], len(slots)
