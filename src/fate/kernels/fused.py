"""A few tokens' way through a layer's small operations, in one native call each. `models/fused/` knows which modules of
a model they stand for.

Roundings to the activations' dtype fall where the modules' own operations round, so results agree with theirs. All
tensors are contiguous, on the CPU and of one dtype, float32, bfloat16 or float16; the extension must be there.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fate.kernels import native, threads
from fate.kernels.native import DTYPE_CODES
from fate.store.format import RecordLayout

NormAddress = tuple[int, int, float, bool]
_NO_NORM: NormAddress = (0, 0, 0.0, False)


class Holder(Protocol):
    """A packed dense module: see `models/packed.py`."""

    packed: Tensor
    layout: RecordLayout
    bias: Any


class PackedMatrix:
    """The packed matrix, and the bias [rows] if there is one, that `holder` has whenever it is asked."""

    __slots__ = ("_bytes", "_record", "cols", "holder", "rows")

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        self.rows, self.cols = holder.layout.matrices[0].rows, holder.layout.matrices[0].cols
        self._bytes = holder.layout.record_bytes
        self._record: object = native.record(holder.layout)

    def __reduce__(self) -> tuple[type[PackedMatrix], tuple[Holder]]:
        """Copied and pickled with its holder: the extension's record is made again."""
        return PackedMatrix, (self.holder,)

    def address(self, dtype: torch.dtype) -> tuple[object, int, int]:
        """What the extension reads; ValueError where memory does not hold what the layout says."""
        packed, bias = self.holder.packed, self.holder.bias
        if packed.dtype != torch.uint8 or not packed.is_contiguous() or packed.numel() < self._bytes:
            raise ValueError(f"packed must be contiguous uint8 of at least {self._bytes} bytes")
        if bias is None:
            return self._record, packed.data_ptr(), 0
        if bias.dtype != dtype or bias.numel() != self.rows or not bias.is_contiguous():
            raise ValueError(f"bias must be contiguous {dtype} [{self.rows}], not {bias.dtype} {tuple(bias.shape)}")
        return self._record, packed.data_ptr(), bias.data_ptr()


class Norm(NamedTuple):
    """RMSNorm: weight [cols], of the activations' dtype. rounds_first: the normalised value is rounded to that dtype
    before it is multiplied by the weight."""

    weight: Tensor
    eps: float
    rounds_first: bool

    def address(self, dtype: torch.dtype) -> NormAddress:
        weight, eps, rounds_first = self
        if weight.dtype != dtype or not weight.is_contiguous():
            raise ValueError(f"a norm's weight must be contiguous {dtype} [cols], not {weight.dtype}")
        return weight.data_ptr(), weight.numel(), eps, rounds_first


HeadNorms = tuple[Norm | None, Norm | None]  # of queries and keys


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32."""
    address = norm.address(x.dtype)
    if x.shape[-1] != address[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}: this norm takes [..., {address[1]}]")
    out = torch.empty_like(x)
    rows = x.numel() // address[1]
    native.extension().rms_norm(address, x.data_ptr(), DTYPE_CODES[x.dtype], rows, out.data_ptr(), threads.count())
    return out


def route(
    x: Tensor, weight: Tensor, top_k: int, normalize: bool, score_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A softmax router's answer for one token, x [1, hidden]: logits [1, experts] of x's dtype, the top_k
    probabilities [1, top_k] of score_dtype, largest first (divided by their sum if `normalize`), and whose they are,
    int64. weight: [experts, hidden] of x's dtype, contiguous."""
    experts, hidden = weight.shape
    if x.numel() != hidden or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(f"x has shape {tuple(x.shape)}: this router takes one token of {hidden} {weight.dtype}")
    logits = torch.empty(1, experts, dtype=x.dtype)
    scores = torch.empty(1, top_k, dtype=score_dtype)
    indices = torch.empty(1, top_k, dtype=torch.int64)
    native.extension().route(
        weight.data_ptr(),
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        (experts, hidden, top_k),
        normalize,
        (logits.data_ptr(), scores.data_ptr(), DTYPE_CODES[score_dtype], indices.data_ptr()),
    )
    return logits, scores, indices


def multiply_few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x [tokens, cols] times weight [rows, cols] of x's dtype, contiguous: [tokens, rows], summed in float32. On one
    thread: for a matrix that is read sooner than torch has begun."""
    rows, cols = weight.shape
    if x.shape[-1] != cols or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(f"x has shape {tuple(x.shape)}: this matrix takes [tokens, {cols}] {weight.dtype}")
    tokens = x.numel() // cols
    out = torch.empty(tokens, rows, dtype=x.dtype)
    native.extension().multiply_few_rows(
        weight.data_ptr(), x.data_ptr(), DTYPE_CODES[x.dtype], rows, cols, tokens, out.data_ptr()
    )
    return out


def add_gated(experts: Tensor, shared: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """experts + sigmoid(x weight^T) * shared, all [tokens, hidden], weight [1, hidden]."""
    tokens, hidden = x.shape
    for given in (experts, shared, weight):
        rows = 1 if given is weight else tokens
        if given.shape != (rows, hidden) or given.dtype != x.dtype or not given.is_contiguous():
            raise ValueError(f"{given.dtype} {tuple(given.shape)} is not contiguous {x.dtype} [{rows}, {hidden}]")
    out = torch.empty_like(x)
    native.extension().add_gated(
        experts.data_ptr(),
        shared.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        DTYPE_CODES[x.dtype],
        tokens,
        hidden,
        out.data_ptr(),
    )
    return out


def gated_mlp(x: Tensor, gate: PackedMatrix, up: PackedMatrix, down: PackedMatrix) -> Tensor:
    """down(silu(gate(x)) * up(x)) of x [tokens, hidden], no biases."""
    dtype = x.dtype
    if x.shape[1] != gate.cols:
        raise ValueError(f"x has shape {tuple(x.shape)}: this MLP takes [tokens, {gate.cols}]")
    out = torch.empty(x.shape[0], down.rows, dtype=dtype)
    native.extension().gated_mlp(
        gate.address(dtype),
        up.address(dtype),
        down.address(dtype),
        x.data_ptr(),
        DTYPE_CODES[dtype],
        x.shape[0],
        out.data_ptr(),
        threads.count(),
    )
    return out


def project_heads(
    x: Tensor,
    matrices: tuple[PackedMatrix, PackedMatrix, PackedMatrix],
    norms: HeadNorms,
    rotary: tuple[Tensor, Tensor],
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each [batch, heads, 1, head_dim], of one new token in each sequence, x [batch, hidden].

    matrices: of queries, keys, values. norms: of queries and keys, over each head or over all of them. rotary: cos and
    sin [batch or 1, 1, dim]; the first dim elements of queries and keys are rotated, in halves.
    """
    batch, hidden = x.shape
    dtype = x.dtype
    if any(matrix.cols != hidden for matrix in matrices):
        raise ValueError(f"x has shape {tuple(x.shape)}, which the matrices do not take")
    query, key, value = outs = tuple(
        torch.empty(batch, matrix.rows // head_dim, 1, head_dim, dtype=dtype) for matrix in matrices
    )
    native.extension().project_heads(
        matrices[0].address(dtype),
        matrices[1].address(dtype),
        matrices[2].address(dtype),
        *head_norm_addresses(norms, dtype),
        rotary_address(rotary, dtype, batch),
        x.data_ptr(),
        DTYPE_CODES[dtype],
        batch,
        head_dim,
        (query.data_ptr(), key.data_ptr(), value.data_ptr()),
        threads.count(),
    )
    return outs[0], outs[1], outs[2]


def head_norm_addresses(norms: HeadNorms, dtype: torch.dtype) -> tuple[NormAddress, NormAddress]:
    query, key = norms
    return _NO_NORM if query is None else query.address(dtype), _NO_NORM if key is None else key.address(dtype)


def rotary_address(rotary: tuple[Tensor, Tensor], dtype: torch.dtype, batch: int) -> tuple[int, int, int, int]:
    cos, sin = rotary
    if cos.shape != sin.shape or cos.dtype != dtype or sin.dtype != dtype or cos.shape[0] not in (1, batch):
        raise ValueError(f"cos and sin must be {dtype} [{batch} or 1, 1, dim], not {cos.dtype} {tuple(cos.shape)}")
    dim = cos.shape[-1]
    return cos.data_ptr(), sin.data_ptr(), dim, dim if cos.shape[0] > 1 else 0


def attend_project(query: Tensor, key: Tensor, value: Tensor, scale: float, matrix: PackedMatrix) -> Tensor:
    """`kernels.attend` of a contiguous query [batch, heads, 1, dim], then the output matrix: [batch, rows]."""
    batch, heads, tokens, key_dim = query.shape
    kv_heads, length, value_dim = value.shape[1:]
    if tokens != 1 or key.shape != (batch, kv_heads, length, key_dim) or value.shape[0] != batch:
        raise ValueError(f"one token over a cache, not {tuple(query.shape)} over {tuple(key.shape)}")
    out = torch.empty(batch, matrix.rows, dtype=query.dtype)
    native.extension().attend_project(
        query.data_ptr(),
        key.data_ptr(),
        key.stride()[:3],
        value.data_ptr(),
        value.stride()[:3],
        DTYPE_CODES[query.dtype],
        (batch, heads, kv_heads, length),
        (key_dim, value_dim),
        scale,
        matrix.address(query.dtype),
        out.data_ptr(),
        threads.count(),
    )
    return out


def attention_half(
    x: Tensor,
    norms: tuple[Norm, Norm],
    matrices: tuple[PackedMatrix, PackedMatrix, PackedMatrix, PackedMatrix],
    head_norms: HeadNorms,
    rotary: tuple[Tensor, Tensor],
    head_dim: int,
    cache: tuple[Tensor, Tensor, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """A decoder layer up to its MLP, for one new token in each sequence, x [batch, 1, hidden]: x + attention of
    norms[0](x), and norms[1] of that sum, both of x's shape.

    matrices: of queries, keys, values and the output. head_norms, rotary, head_dim: as for `project_heads`. cache: keys
    and values [batch, kv heads, positions, head_dim] in any strides but the last, and the position at which the token's
    own are written; it attends to them and to all before.
    """
    batch, dtype, (keys, values, first) = x.shape[0], x.dtype, cache
    shape = (batch, matrices[1].rows // head_dim, keys.shape[2], head_dim)
    for held in (keys, values):
        if held.shape != shape or held.dtype != dtype or held.stride(3) != 1 or not 0 <= first < shape[2]:
            raise ValueError(f"no room for position {first} of {dtype} {shape} in {held.dtype} {tuple(held.shape)}")
    if x.shape[1:] != (1, matrices[0].cols) or not x.is_contiguous():
        raise ValueError(f"x has shape {tuple(x.shape)}: this layer takes [batch, 1, {matrices[0].cols}], contiguous")
    query, key, value, output = matrices
    residual, normed = torch.empty_like(x), torch.empty_like(x)
    native.extension().attention_half(
        (norms[0].address(dtype), norms[1].address(dtype)),
        (query.address(dtype), key.address(dtype), value.address(dtype), output.address(dtype)),
        head_norm_addresses(head_norms, dtype),
        rotary_address(rotary, dtype, batch),
        x.data_ptr(),
        DTYPE_CODES[dtype],
        batch,
        head_dim,
        (keys.data_ptr(), keys.stride()[:3], values.data_ptr(), values.stride()[:3], first + 1),
        scale,
        (residual.data_ptr(), normed.data_ptr()),
        threads.count(),
    )
    return residual, normed
