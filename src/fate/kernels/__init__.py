"""Arithmetic on packed weights: the small interface the runtime calls, several times per layer and token.

Weights stay packed; activations are quantized to int8 per group of 64 columns (those between the matrices of an expert
twice: values, and what rounding left of them), so a product differs from exact arithmetic by less than a percent, and
never differs from itself: one (token, expert) gives the same bits whatever else is in the call, however many threads
run it and wherever the record lies. Raw codecs are torch's own products.

>>> rows = torch.empty(tokens, top_k, hidden)
>>> experts(x, pool, layout, [0], [Precision.FULL], [0, len(pairs)], pairs, rows)
>>> out = reduce_rows(rows, routing_weights, x.dtype)

`reference` is the meaning, in torch; `cpu/` the C++ kernels; `native` knows which of them run. Callers pass CPU
tensors. Wrong shapes, dtypes or offsets raise ValueError: they are a caller's mistake, not a user's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fate.core import Precision
from fate.kernels import native, raw, reference, threads
from fate.kernels.activation import SWIGLU, ExpertActivation
from fate.kernels.native import DTYPE_CODES, KernelInfo, active
from fate.kernels.reference import ExpertBiases
from fate.store.format import RecordLayout

__all__ = [
    "SWIGLU",
    "ExpertActivation",
    "ExpertBiases",
    "KernelInfo",
    "active",
    "attend",
    "can_attend",
    "experts",
    "gather_rows",
    "linear",
    "reduce_rows",
]


def linear(
    x: Tensor,
    packed: Tensor,
    layout: RecordLayout,
    index: int = 0,
    precision: Precision = Precision.FULL,
    bias: Tensor | None = None,
) -> Tensor:
    """x times matrix `index` of a record, plus bias.

    x: [M, cols] float32, bfloat16 or float16. packed: uint8 [>= layout.record_bytes]; at INT2 the bytes beyond the
    prefix are not read. bias: [rows] of x's dtype. Returns [M, rows] of x's dtype.
    """
    spec = layout.matrices[index]
    if x.dim() != 2 or x.shape[1] != spec.cols:
        raise ValueError(f"x has shape {tuple(x.shape)}: {spec.name} takes [tokens, {spec.cols}]")
    _check_packed(packed, layout, precision)
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (spec.rows,) or not bias.is_contiguous()):
        raise ValueError(f"bias must be contiguous {x.dtype} [{spec.rows}], not {bias.dtype} {tuple(bias.shape)}")
    if layout.is_raw:
        return raw.linear(x, packed, layout, index, bias)
    cpu = native.extension()
    if cpu is None:
        return reference.linear(x, packed, layout, index, precision, bias)
    x = x.contiguous()
    out = torch.empty(x.shape[0], spec.rows, dtype=x.dtype)
    cpu.linear(
        native.record(layout),
        index,
        precision is Precision.INT2,
        packed.data_ptr(),
        x.data_ptr(),
        _dtype_code(x.dtype),
        x.shape[0],
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        threads.count(),
    )
    return out


def experts(
    x: Tensor,
    pool: Tensor,
    layout: RecordLayout,
    slot_offsets: Sequence[int],
    precisions: Sequence[Precision],
    pair_offsets: Sequence[int],
    pairs: Tensor,
    rows: Tensor,
    activation: ExpertActivation = SWIGLU,
    biases: ExpertBiases | None = None,
) -> None:
    """rows[token, rank] = down(activation(first(x[token]))) for the pairs of every expert listed.

    x: [M, H] float32, bfloat16 or float16. pool: uint8 [bytes of all slots]. layout: matrices gate_up_proj [2I, H]
    (up_proj [I, H] where nothing gates) and down_proj [H, I]. slot_offsets: E byte offsets of records in pool, 64-byte
    aligned. precisions: E. pair_offsets: E + 1; expert e owns pairs[pair_offsets[e]:pair_offsets[e + 1]].
    pairs: int32 [S, 2] = (token, rank), contiguous. rows: float32 [M, k, H], contiguous; only the pairs' rows are set.
    biases: added to what the matrices give.
    """
    hidden = layout.matrices[0].cols
    if x.dim() != 2 or x.shape[1] != hidden:
        raise ValueError(f"x has shape {tuple(x.shape)}: this expert takes [tokens, {hidden}]")
    if rows.dtype != torch.float32 or not rows.is_contiguous() or rows.shape[::2] != x.shape:
        raise ValueError(f"rows must be contiguous float32 [{x.shape[0]}, k, {hidden}], not {tuple(rows.shape)}")
    if pairs.dtype != torch.int32 or pairs.dim() != 2 or pairs.shape[1] != 2 or not pairs.is_contiguous():
        raise ValueError(f"pairs must be contiguous int32 [S, 2], not {pairs.dtype} {tuple(pairs.shape)}")
    if pool.dtype != torch.uint8 or not pool.is_contiguous():
        raise ValueError(f"pool must be contiguous uint8, not {pool.dtype}")
    if layout.is_raw:
        return raw.experts(x, pool, layout, slot_offsets, pair_offsets, pairs, rows, activation, biases)
    cpu = native.extension()
    if cpu is None:
        return reference.experts(
            x, pool, layout, slot_offsets, precisions, pair_offsets, pairs, rows, activation, biases
        )
    if layout.codec == "int8" and Precision.INT2 in precisions:
        raise ValueError("an int8 record cannot be read at INT2: only at FULL")
    x = x.contiguous()
    cpu.experts(
        native.record(layout),
        native.activation(activation),
        None if biases is None else _bias_addresses(biases, layout),
        pool.data_ptr(),
        pool.numel(),
        slot_offsets,
        precisions,
        pair_offsets,
        pairs.data_ptr(),
        pairs.shape[0],
        x.data_ptr(),
        _dtype_code(x.dtype),
        x.shape[0],
        rows.data_ptr(),
        rows.shape[1],
        threads.count(),
    )
    return None


def reduce_rows(rows: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over ranks of weights times rows, in rank order and float32, cast to `dtype` at the end.

    rows: float32 [M, k, H]. weights: [M, k], any float dtype; a rank whose weight is exactly zero is skipped, so its
    row may hold anything. Returns [M, H] of `dtype`.
    """
    if rows.dtype != torch.float32 or rows.dim() != 3 or rows.shape[:2] != weights.shape:
        raise ValueError(f"rows {rows.dtype} {tuple(rows.shape)} and weights {tuple(weights.shape)} do not fit")
    cpu = native.extension()
    if cpu is None or dtype not in DTYPE_CODES:
        return reference.reduce_rows(rows, weights, dtype)
    tokens, top_k, hidden = rows.shape
    rows = rows.contiguous()
    weights = (weights if weights.dtype in DTYPE_CODES else weights.float()).contiguous()
    out = torch.empty(tokens, hidden, dtype=dtype)
    cpu.reduce_rows(
        rows.data_ptr(),
        weights.data_ptr(),
        DTYPE_CODES[weights.dtype],
        tokens,
        top_k,
        hidden,
        DTYPE_CODES[dtype],
        out.data_ptr(),
        threads.count(),
    )
    return out


def gather_rows(packed: Tensor, layout: RecordLayout, index: int, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (int64 [n]) of matrix `index`, dequantized: [n, cols] of `dtype`. IndexError for an id outside."""
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"ids must be int64 [n], not {ids.dtype} {tuple(ids.shape)}")
    _check_packed(packed, layout, Precision.FULL)
    if layout.is_raw:
        return reference.raw_matrix(packed, layout, index)[ids].to(dtype)
    cpu = native.extension()
    if cpu is None:
        return reference.gather_rows(packed, layout, index, ids, dtype)
    ids = ids.contiguous()
    out = torch.empty(ids.shape[0], layout.matrices[index].cols, dtype=dtype)
    cpu.gather_rows(
        native.record(layout),
        index,
        packed.data_ptr(),
        ids.data_ptr(),
        ids.shape[0],
        _dtype_code(dtype),
        out.data_ptr(),
        threads.count(),
    )
    return out


def can_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` takes these tensors: on the CPU, all of one dtype, heads contiguous, and kernels compiled."""
    return (
        native.extension() is not None
        and query.dtype in DTYPE_CODES
        and query.dtype == key.dtype == value.dtype
        and query.device.type == key.device.type == value.device.type == "cpu"
        and key.stride(-1) == value.stride(-1) == 1
        and key.shape[2] == value.shape[2] > 0
    )


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    """softmax(scale * query key^T) value of one new token, in float32 and rounded once at the end. sinks: [heads], a
    score of each head that counts in its softmax and has no value.

    query: [batch, heads, 1, dim]. key, value: [batch, kv heads, positions, dim (value's may differ)] in any strides
    but the last; heads is a multiple of kv heads. Only what `can_attend`. Returns [batch, 1, heads, value dim].
    """
    batch, heads, tokens, key_dim = query.shape
    kv_heads, length, value_dim = value.shape[1:]
    if tokens != 1 or key.shape != (batch, kv_heads, length, key_dim) or value.shape[0] != batch:
        raise ValueError(f"one token over a cache, not {tuple(query.shape)} over {tuple(key.shape)}")
    if sinks is not None:
        if sinks.shape != (heads,):
            raise ValueError(f"sinks must be [{heads}], not {tuple(sinks.shape)}")
        sinks = sinks.float().contiguous()
    query = query.contiguous()
    out = torch.empty(batch, 1, heads, value_dim, dtype=query.dtype)
    native.extension().attend(
        query.data_ptr(),
        key.data_ptr(),
        key.stride()[:3],
        value.data_ptr(),
        value.stride()[:3],
        DTYPE_CODES[query.dtype],
        (batch, heads, kv_heads, length),
        (key_dim, value_dim),
        scale,
        0 if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
        threads.count(),
    )
    return out


def _bias_addresses(biases: ExpertBiases, layout: RecordLayout) -> tuple[int, int, int, int, Sequence[int]]:
    first, down = biases.first, biases.down
    for bias, spec in zip((first, down), layout.matrices):
        if bias.dtype != first.dtype or bias.shape != (len(first), spec.rows) or not bias.is_contiguous():
            raise ValueError(
                f"biases of {spec.name} must be contiguous {first.dtype} [{len(first)}, {spec.rows}], "
                f"not {bias.dtype} {tuple(bias.shape)}"
            )
    return first.data_ptr(), down.data_ptr(), _dtype_code(first.dtype), len(first), biases.numbers


def _check_packed(packed: Tensor, layout: RecordLayout, precision: Precision) -> None:
    if packed.dtype != torch.uint8 or not packed.is_contiguous() or packed.numel() < layout.record_bytes:
        raise ValueError(
            f"packed must be contiguous uint8 of at least {layout.record_bytes} bytes, "
            f"not {packed.dtype} {tuple(packed.shape)}"
        )
    if precision is Precision.INT2 and layout.codec != "int4":
        raise ValueError(f"a {layout.codec} record cannot be read at INT2: only at FULL")


def _dtype_code(dtype: torch.dtype) -> int:
    try:
        return DTYPE_CODES[dtype]
    except KeyError:
        raise ValueError(f"{dtype} activations are not supported: use float32, bfloat16 or float16") from None
