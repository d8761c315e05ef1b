"""A decoder layer of a few rows in two native calls, and the small operations that they are made of.

Each row is a new token of its own sequence. The first call is attention and routing: `AttentionHalf`, or, where
attention is a family's own, `route` or `group`. The second is experts and sum (`ExpertHalf`), in one piece where all
experts are in memory, otherwise in pieces as they arrive. `Buffers` holds what passes between them.

The functions below compute the same for any number of rows. A row's bits depend on nothing but the row: not on the rows
beside it, on threads, or on the pieces. All tensors are contiguous and on the CPU, float32, bfloat16 or float16; the
extension must be there. Wrong shapes or dtypes raise ValueError.

>>> buffers = Buffers(MAX_ROWS, hidden=2048, top_k=4, num_experts=60, dtype=torch.bfloat16)
>>> routed = attention(buffers, x, (cos, sin), kv)
>>> experts(buffers, rows, routed.experts, slots, None, first=True, last=True, out=out, add_residual=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fate.core import Precision
from fate.kernels import native, threads
from fate.kernels.activation import ExpertActivation
from fate.kernels.native import DTYPE_CODES
from fate.store.format import RecordLayout

MAX_ROWS = 16
_NO_NORM = (0, 0, 0.0, False)


class Norm(NamedTuple):
    """RMSNorm. weight: [cols] of the activations' dtype. round_before_scale: the normalised value is rounded to that
    dtype before it is multiplied by the weight."""

    weight: Tensor
    eps: float
    round_before_scale: bool


class PackedMatrix(NamedTuple):
    """A dense matrix. packed: uint8, a record of one matrix. bias: [rows] of the activations' dtype."""

    packed: Tensor
    layout: RecordLayout
    bias: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.layout.matrices[0].rows

    @property
    def cols(self) -> int:
        return self.layout.matrices[0].cols


class Router(NamedTuple):
    """A softmax router. weight: [experts, hidden] of the activations' dtype. renormalize: the scores of the top_k are
    divided by their sum."""

    weight: Tensor
    top_k: int
    renormalize: bool
    score_dtype: torch.dtype


class SharedExpert(NamedTuple):
    """down(silu(gate(x)) * up(x)), times sigmoid(x share^T) where there is a share [1, hidden]."""

    gate: PackedMatrix
    up: PackedMatrix
    down: PackedMatrix
    share: Tensor | None = None


class KVRows(NamedTuple):
    """The KV cache of each row. keys, values: addresses of head 0, position 0. key_strides, value_strides: (head,
    position) in elements. starts: the first position a row attends to. lengths: positions with the new one; the row's
    own key and value are written at length - 1."""

    keys: Sequence[int]
    values: Sequence[int]
    key_strides: tuple[int, int]
    value_strides: tuple[int, int]
    starts: Sequence[int]
    lengths: Sequence[int]


class Routed(NamedTuple):
    """What routing says of all rows. experts: the distinct ones, the most pairs first, of equals the lower number.
    pairs: how many (row, rank) each has; those of weight zero are dropped. weights: the sum over them."""

    experts: list[int]
    pairs: list[int]
    weights: list[float]


class Buffers:
    """Memory between the two calls, for at most `rows` rows, one for all layers of a model.

    residual, normed: [rows, hidden], what the first call leaves. logits [rows, num_experts], indices [rows, top_k].
    """

    def __init__(self, rows: int, hidden: int, top_k: int, num_experts: int, dtype: torch.dtype) -> None:
        self.rows, self.top_k, self.num_experts = rows, top_k, num_experts
        self.residual = torch.zeros(rows, hidden, dtype=dtype)
        self.normed = torch.zeros(rows, hidden, dtype=dtype)
        self.logits = torch.zeros(rows, num_experts, dtype=dtype)
        self.indices = torch.zeros(rows, top_k, dtype=torch.int64)
        self._normed_of = [self.normed[:count] for count in range(rows + 1)]
        self._rotary: tuple[object, tuple[int, int, int, int]] = (None, (0, 0, 0, 0))
        self._shared = torch.zeros(rows, hidden, dtype=dtype)
        self._scores = torch.zeros(rows, top_k)
        self._pair_rows = torch.zeros(rows, top_k, hidden)
        held = (self.residual, self.normed, self._shared, self.logits, self._scores, self.indices, self._pair_rows)
        addresses = tuple(tensor.data_ptr() for tensor in held)
        self.native: Any = native.extension().Buffers.make(
            rows, hidden, top_k, num_experts, dtype_code(dtype), addresses
        )

    def normed_of(self, rows: int) -> Tensor:
        """The first rows of `normed`."""
        return self._normed_of[rows]

    def rotary_address(self, rotary: tuple[Tensor, Tensor], rows: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
        """Of cos and sin [rows or 1, 1, dim]; all layers of a step have the same."""
        if self._rotary[0] is not rotary:
            cos, sin = rotary
            if cos.dtype is not dtype or sin.dtype is not dtype or cos.shape[0] not in (1, rows):
                raise ValueError(f"cos and sin must be {dtype} [{rows} or 1, 1, dim], not {tuple(cos.shape)}")
            step = cos.shape[-1] if cos.shape[0] > 1 else 0
            self._rotary = rotary, (cos.data_ptr(), sin.data_ptr(), cos.shape[-1], step)
        return self._rotary[1]


class AttentionHalf:
    """The first call of a layer: residual = x + attention(input_norm(x)), normed = post_norm(residual), and, with a
    router, the routing of normed. query_norm, key_norm: over each head, or over all heads at once."""

    def __init__(
        self,
        *,
        input_norm: Norm,
        query: PackedMatrix,
        key: PackedMatrix,
        value: PackedMatrix,
        output: PackedMatrix,
        query_norm: Norm | None,
        key_norm: Norm | None,
        post_norm: Norm,
        head_dim: int,
        scale: float,
        router: Router | None,
        dtype: torch.dtype,
    ) -> None:
        matrices = (query, key, value, output)
        self._held = (input_norm, post_norm, query_norm, key_norm, matrices, router)  # keeps the memory alive
        self._dtype = dtype
        self._native = native.extension().AttentionHalf.make(
            (_norm(input_norm, dtype), _norm(post_norm, dtype)),
            tuple(_packed(matrix, dtype) for matrix in matrices),
            tuple(_NO_NORM if norm is None else _norm(norm, dtype) for norm in (query_norm, key_norm)),
            head_dim,
            scale,
            dtype_code(dtype),
        )
        self._router = None if router is None else native_router(router, dtype)

    def __call__(self, buffers: Buffers, x: Tensor, rotary: tuple[Tensor, Tensor], kv: KVRows) -> Routed | None:
        """x [rows, 1, hidden]; rotary: cos and sin [rows or 1, 1, dim]: the first dim elements of a head are rotated in
        halves. The new keys and values are written to the cache. None without a router."""
        rows = len(kv.keys)
        if x.dtype is not self._dtype or x.shape[0] != rows or not x.is_contiguous():
            raise ValueError(f"x must be contiguous {self._dtype} of {rows} rows, not {x.dtype} {tuple(x.shape)}")
        routed = self._native.run(
            buffers.native,
            self._router,
            x.data_ptr(),
            buffers.rotary_address(rotary, rows, self._dtype),
            list(zip(kv.keys, kv.values, kv.starts, kv.lengths)),
            kv.key_strides,
            kv.value_strides,
            threads.count(),
        )
        return None if routed is None else Routed(*routed)


class ExpertHalf:
    """The second call of a layer: experts from slots of `slot_bytes` in `pool`, the shared expert, and the sum.

    biases: of both matrices, [experts, rows], or None.
    """

    def __init__(
        self,
        *,
        layout: RecordLayout,
        activation: ExpertActivation,
        biases: tuple[Tensor, Tensor] | None,
        shared: SharedExpert | None,
        pool: Tensor,
        slot_bytes: int,
        dtype: torch.dtype,
    ) -> None:
        self._held = (biases, shared, pool)  # keeps the memory alive
        self.has_shared = shared is not None
        code = dtype_code(dtype)
        self._native = native.extension().ExpertHalf.make(
            native.record(layout),
            native.activation(activation),
            None if biases is None else _biases(biases, layout),
            None if shared is None else _shared(shared, dtype),
            pool.data_ptr(),
            pool.numel(),
            slot_bytes,
            code,
        )

    def __call__(
        self,
        buffers: Buffers,
        rows: int,
        experts: Sequence[int],
        slots: Sequence[int],
        precisions: Sequence[Precision] | None = None,
        *,
        first: bool,
        last: bool,
        out: Tensor | None,
        add_residual: bool,
    ) -> None:
        """Compute all pairs of these experts, which are in these slots. first: also the shared expert. last: also the
        sum of all pairs in rank order, the shared expert's output and, if `add_residual`, buffers.residual, to `out`
        [rows, hidden]. precisions: None where all are read in full."""
        self._native.run(
            buffers.native,
            rows,
            experts,
            slots,
            precisions or (),
            first,
            last,
            add_residual,
            0 if out is None else out.data_ptr(),
            threads.count(),
        )


def route(router: Any, buffers: Buffers, x: Tensor) -> Routed:
    """Route x [rows, hidden], which becomes buffers.normed. router: what `native_router` made."""
    return Routed(*native.extension().route(router, buffers.native, x.data_ptr(), x.shape[0], threads.count()))


def group(buffers: Buffers, x: Tensor, indices: Tensor, weights: Tensor, num_experts: int) -> Routed:
    """Take over what a family's own router says of x [rows, hidden]: indices int64 and weights [rows, ranks]. An index
    from num_experts on is nobody's."""
    rows, ranks = indices.shape
    if weights.shape != indices.shape or indices.dtype != torch.int64 or x.shape[0] != rows:
        raise ValueError(
            f"{weights.dtype} {tuple(weights.shape)} and {indices.dtype} {tuple(indices.shape)} do not fit"
        )
    indices, weights, x = indices.contiguous(), weights.contiguous(), x.contiguous()
    return Routed(
        *native.extension().group(
            buffers.native,
            x.data_ptr(),
            rows,
            ranks,
            num_experts,
            indices.data_ptr(),
            weights.data_ptr(),
            dtype_code(weights.dtype),
        )
    )


def native_router(router: Router, dtype: torch.dtype) -> Any:
    """The extension's own object; good for as long as the weight stays where it is."""
    weight = router.weight
    if weight.dtype != dtype or not weight.is_contiguous():
        raise ValueError(f"a router's weight must be contiguous {dtype} [experts, hidden], not {weight.dtype}")
    return native.extension().Router.make(
        weight.data_ptr(), weight.shape[0], router.top_k, router.renormalize, dtype_code(router.score_dtype)
    )


def route_rows(router: Router, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [tokens, hidden] -> logits [tokens, experts] of x's dtype; the top_k probabilities [tokens, top_k] of
    score_dtype, largest first; and whose they are, int64."""
    tokens, experts = x.shape[0], router.weight.shape[0]
    logits = torch.empty(tokens, experts, dtype=x.dtype)
    scores = torch.empty(tokens, router.top_k, dtype=router.score_dtype)
    indices = torch.empty(tokens, router.top_k, dtype=torch.int64)
    native.extension().route_rows(
        native_router(router, x.dtype),
        x.data_ptr(),
        dtype_code(x.dtype),
        x.shape[1],
        tokens,
        logits.data_ptr(),
        scores.data_ptr(),
        indices.data_ptr(),
        threads.count(),
    )
    return logits, scores, indices


def rank_experts(weight: Tensor, x: Tensor, limit: int) -> list[list[tuple[int, float]]]:
    """Of each row of x [rows, hidden]: the `limit` likeliest experts by softmax(x weight^T), with probabilities."""
    experts, hidden = weight.shape
    if weight.dtype != x.dtype or x.shape[-1] != hidden or not (weight.is_contiguous() and x.is_contiguous()):
        raise ValueError(f"x {x.dtype} {tuple(x.shape)} does not fit a gate of {weight.dtype} {tuple(weight.shape)}")
    rows, code = x.numel() // hidden, dtype_code(x.dtype)
    ranked: list[list[tuple[int, float]]] = native.extension().rank_experts(
        weight.data_ptr(), x.data_ptr(), code, experts, hidden, rows, limit, threads.count()
    )
    return ranked


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32."""
    address = _norm(norm, x.dtype)
    if x.shape[-1] != address[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}: this norm takes [..., {address[1]}]")
    out = torch.empty_like(x)
    rows = x.numel() // address[1]
    native.extension().rms_norm(address, x.data_ptr(), dtype_code(x.dtype), rows, out.data_ptr(), threads.count())
    return out


def multiply_few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x [tokens, cols] times weight [rows, cols] of x's dtype: [tokens, rows], summed in float32."""
    rows, cols = weight.shape
    if x.shape[-1] != cols or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(f"x has shape {tuple(x.shape)}: this matrix takes [tokens, {cols}] {weight.dtype}")
    tokens = x.numel() // cols
    out = torch.empty(tokens, rows, dtype=x.dtype)
    native.extension().multiply_few_rows(
        weight.data_ptr(), x.data_ptr(), dtype_code(x.dtype), rows, cols, tokens, out.data_ptr(), threads.count()
    )
    return out


def gated_mlp(x: Tensor, gate: PackedMatrix, up: PackedMatrix, down: PackedMatrix) -> Tensor:
    """down(silu(gate(x)) * up(x)) of x [tokens, hidden], no biases."""
    if x.shape[1] != gate.cols:
        raise ValueError(f"x has shape {tuple(x.shape)}: this MLP takes [tokens, {gate.cols}]")
    out = torch.empty(x.shape[0], down.rows, dtype=x.dtype)
    matrices = tuple(_packed(matrix, x.dtype) for matrix in (gate, up, down))
    code = dtype_code(x.dtype)
    native.extension().gated_mlp(*matrices, x.data_ptr(), code, x.shape[0], out.data_ptr(), threads.count())
    return out


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and dtype."""
    out, up = gate.clone(memory_format=torch.contiguous_format), up.contiguous()
    if up.shape != out.shape or up.dtype != out.dtype:
        raise ValueError(f"{gate.dtype} {tuple(gate.shape)} and {up.dtype} {tuple(up.shape)} do not fit")
    native.extension().silu_times(out.data_ptr(), up.data_ptr(), dtype_code(out.dtype), out.numel(), threads.count())
    return out


def add_gated(experts: Tensor, shared: Tensor, logits: Tensor) -> Tensor:
    """experts + sigmoid(logits) * shared, [tokens, hidden] with logits [tokens, 1]."""
    tokens, hidden = experts.shape
    if (
        shared.shape != experts.shape
        or logits.shape != (tokens, 1)
        or not shared.dtype == logits.dtype == experts.dtype
    ):
        raise ValueError(f"{tuple(experts.shape)}, {tuple(shared.shape)}, {tuple(logits.shape)} do not fit")
    out = torch.empty_like(experts)
    native.extension().add_gated(
        experts.data_ptr(),
        shared.data_ptr(),
        logits.data_ptr(),
        dtype_code(experts.dtype),
        tokens,
        hidden,
        out.data_ptr(),
        threads.count(),
    )
    return out


def dtype_code(dtype: torch.dtype) -> int:
    try:
        return DTYPE_CODES[dtype]
    except KeyError:
        raise ValueError(f"{dtype} is not supported: use float32, bfloat16 or float16") from None


def _norm(norm: Norm, dtype: torch.dtype) -> tuple[int, int, float, bool]:
    if norm.weight.dtype != dtype or not norm.weight.is_contiguous():
        raise ValueError(f"a norm's weight must be contiguous {dtype} [cols], not {norm.weight.dtype}")
    return norm.weight.data_ptr(), norm.weight.numel(), norm.eps, norm.round_before_scale


def _packed(matrix: PackedMatrix, dtype: torch.dtype) -> tuple[object, int, int]:
    packed, layout, bias = matrix
    if packed.dtype != torch.uint8 or not packed.is_contiguous() or packed.numel() < layout.record_bytes:
        raise ValueError(f"packed must be contiguous uint8 of at least {layout.record_bytes} bytes")
    if bias is None:
        return native.record(layout), packed.data_ptr(), 0
    if bias.dtype != dtype or bias.numel() != matrix.rows or not bias.is_contiguous():
        raise ValueError(f"bias must be contiguous {dtype} [{matrix.rows}], not {bias.dtype} {tuple(bias.shape)}")
    return native.record(layout), packed.data_ptr(), bias.data_ptr()


def _shared(shared: SharedExpert, dtype: torch.dtype) -> tuple[object, object, object, int]:
    share, hidden = shared.share, shared.gate.cols
    if share is not None and (share.shape != (1, hidden) or share.dtype != dtype or not share.is_contiguous()):
        raise ValueError(f"share must be contiguous {dtype} [1, {hidden}], not {share.dtype} {tuple(share.shape)}")
    matrices = (_packed(matrix, dtype) for matrix in (shared.gate, shared.up, shared.down))
    return *matrices, 0 if share is None else share.data_ptr()  # type: ignore[return-value]


def _biases(biases: tuple[Tensor, Tensor], layout: RecordLayout) -> tuple[int, int, int, int]:
    first, down = biases
    for bias, spec in zip(biases, layout.matrices):
        if bias.dtype != first.dtype or bias.shape != (len(first), spec.rows) or not bias.is_contiguous():
            raise ValueError(f"biases of {spec.name} must be contiguous {first.dtype} [{len(first)}, {spec.rows}]")
    return first.data_ptr(), down.data_ptr(), dtype_code(first.dtype), len(first)
