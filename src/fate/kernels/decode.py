"""A decoder layer for 1 to 16 rows in two native calls. Each row is the new token of a sequence of its own.

    MixerHalf    residual = x + mixer(input_norm(x)); normed = post_norm(residual); the router's choice
    ExpertHalf   the chosen experts, in as many calls as their weights arrive in; the last one sums everything up

Objects are built once, when a model is loaded; weights must then stay where they are. `Buffers` carry what the second
call takes from the first. Every row gets the bits that the functions of `ops` and `kernels` give for that row alone,
whatever rows share the call, however many threads run it, and in whatever groups the experts arrive.

>>> routed = first_half(buffers, x, (cos, sin), kv)
>>> here, missing = ...  # which of routed.experts are in memory
>>> experts(buffers, rows, here, slots, None, first=True, last=False, out=None, add_residual=False)
>>> experts(buffers, rows, missing, more_slots, None, first=False, last=True, out=x, add_residual=True)

Codecs are int4 and int8, and the compiled extension must be there. Wrong shapes, dtypes and orders of calls raise
ValueError. Calls release the interpreter; one Buffers serves one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fate.core import Precision
from fate.kernels import native, threads
from fate.kernels.activation import ExpertActivation
from fate.kernels.mixers import (
    Attention,
    DeltaRule,
    KVRows,
    LatentAttention,
    Mixer,
    Rotary,
    Rotation,
    StateRows,
    angles,
)
from fate.kernels.native import DTYPE_CODES
from fate.kernels.ops import (
    Norm,
    PackedMatrix,
    Router,
    Scoring,
    SharedExpert,
    add_gated,
    add_gated_logits,
    extension,
    gated_mlp,
    multiply_few_rows,
    native_norm,
    native_router,
    native_shared_expert,
    rank_experts,
    rms_norm,
    route_rows,
    silu_times,
)
from fate.store.format import RecordLayout

__all__ = [
    "MAX_ROWS",
    "Attention",
    "Buffers",
    "DeltaRule",
    "ExpertHalf",
    "KVRows",
    "LatentAttention",
    "Mixer",
    "MixerHalf",
    "Norm",
    "PackedMatrix",
    "Rotary",
    "Rotation",
    "Routed",
    "Router",
    "RouterCall",
    "Scoring",
    "SharedExpert",
    "StateRows",
    "add_gated",
    "add_gated_logits",
    "gated_mlp",
    "group",
    "multiply_few_rows",
    "rank_experts",
    "rms_norm",
    "route",
    "route_rows",
    "scratch_bytes",
    "silu_times",
]

MAX_ROWS = 16


class Routed(NamedTuple):
    """Which experts all rows chose together. Pairs (row, rank) of weight zero, and of indices that are no expert's, are
    dropped."""

    experts: list[int]  # distinct; most pairs first, of equals the lower number
    pairs: list[int]  # of each expert
    weights: list[float]  # sum of each expert's routing weights


class Buffers:
    """What the two calls of a layer share: allocated once, reused by every layer.

    residual: x + attention, and normed: the block's input, [rows, hidden] of dtype. Of the last routing: logits
    [rows, experts] of dtype, scores [rows, top_k] as the router's module would give them, indices int64 [rows, top_k].
    A call of fewer rows sets the first ones of each.
    """

    def __init__(self, rows: int, hidden: int, top_k: int, num_experts: int, dtype: torch.dtype) -> None:
        if dtype not in DTYPE_CODES:
            raise ValueError(f"{dtype} activations are not supported: use float32, bfloat16 or float16")
        if not 1 <= rows <= MAX_ROWS:
            raise ValueError(f"buffers take 1 to {MAX_ROWS} rows, not {rows}")
        self.rows, self.hidden, self.top_k, self.dtype = rows, hidden, top_k, dtype
        self.residual = torch.zeros(rows, hidden, dtype=dtype)
        self.normed = torch.zeros(rows, hidden, dtype=dtype)
        self._logits = torch.zeros(rows * num_experts, dtype=torch.float32)
        self._scores = torch.zeros(rows * top_k, dtype=torch.float32)
        self._indices = torch.zeros(rows * top_k, dtype=torch.int64)
        self._form = num_experts, top_k, dtype, dtype  # of the last routing
        self._normed_of = [self.normed[:count] for count in range(rows + 1)]
        self._rotary: dict[Rotation, tuple[Rotary, tuple[int, int, int, int, int]]] = {}
        self.native = extension().Buffers(
            rows,
            hidden,
            top_k,
            num_experts,
            DTYPE_CODES[dtype],
            self.residual.data_ptr(),
            self.normed.data_ptr(),
            self._logits.data_ptr(),
            self._scores.data_ptr(),
            self._indices.data_ptr(),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all memory of these buffers."""
        tensors = self.residual, self.normed, self._logits, self._scores, self._indices
        return sum(tensor.nbytes for tensor in tensors) + int(self.native.bytes())

    @property
    def logits(self) -> Tensor:
        num_experts, _, _, dtype = self._form
        return self._logits.view(dtype)[: self.rows * num_experts].view(self.rows, num_experts)

    @property
    def scores(self) -> Tensor:
        _, top_k, dtype, _ = self._form
        return self._scores.view(dtype)[: self.rows * top_k].view(self.rows, top_k)

    @property
    def indices(self) -> Tensor:
        top_k = self._form[1]
        return self._indices[: self.rows * top_k].view(self.rows, top_k)

    def normed_of(self, rows: int) -> Tensor:
        """The first rows of `normed`."""
        return self._normed_of[rows]

    def rotary_address(self, rotary: Rotary, rows: int, rotation: Rotation) -> tuple[int, int, int, int, int]:
        """Of the angles, checked. All layers of one kind have the same object in a step."""
        held = self._rotary.get(rotation)
        if held is None or held[0] is not rotary:
            held = self._rotary[rotation] = rotary, angles(rotary, rows, rotation, self.dtype)
        return held[1]

    def routed_by(self, num_experts: int, top_k: int, score_dtype: torch.dtype, logit_dtype: torch.dtype) -> None:
        """Note the shapes and dtypes of the routing that was just written."""
        self._form = num_experts, top_k, score_dtype, logit_dtype


class MixerHalf:
    """The first half of a decoder layer: a mixer between two norms, and the router's choice."""

    def __init__(self, input_norm: Norm, mixer: Mixer, post_norm: Norm, router: Router | None) -> None:
        dtype = mixer.dtype
        self.mixer = mixer
        self._held = input_norm, post_norm, router  # keeps weights alive
        self._router = None if router is None else native_router(router, dtype)
        self._routing = None if router is None else routing_of(router, dtype)
        self._native = extension().MixerHalf(
            native_norm(input_norm, dtype), native_norm(post_norm, dtype), mixer.native
        )

    def __call__(self, buffers: Buffers, x: Tensor, rotary: Rotary | None, place: KVRows | StateRows) -> Routed | None:
        """x: [rows, hidden] or [rows, 1, hidden]. rotary: the angles of the mixer's rotation, None where it has none.
        Extends what each row's sequence has kept in its place, sets buffers.residual and .normed, and, with a router,
        routes."""
        mixer = self.mixer
        rows = _num_rows(x, mixer.hidden, mixer.dtype)
        kept = isinstance(place, StateRows)
        routed = self._native.run(
            buffers.native,
            self._router,
            x.data_ptr(),
            rows,
            None if rotary is None or mixer.rotation is None else buffers.rotary_address(rotary, rows, mixer.rotation),
            None if kept else place,
            place.addresses if isinstance(place, StateRows) else None,
            threads.count(),
        )
        if self._routing is None:
            return None
        buffers.routed_by(*self._routing)
        return Routed(*routed)


def routing_of(router: Router, dtype: torch.dtype) -> tuple[int, int, torch.dtype, torch.dtype]:
    """Experts, top_k, and the dtypes of scores and logits."""
    logit_dtype = torch.float32 if router.float_logits else dtype
    return router.weight.shape[0], router.top_k, router.score_dtype, logit_dtype


class RouterCall:
    """The first call of a block whose attention is not ours."""

    def __init__(self, router: Router, dtype: torch.dtype) -> None:
        self._router = router  # keeps its weight alive
        self._native = native_router(router, dtype)

    def __call__(self, buffers: Buffers, x: Tensor) -> Routed:
        """Routes x [rows, hidden] or [rows, 1, hidden] and sets buffers.normed to it."""
        rows = _num_rows(x, buffers.hidden, buffers.dtype)
        routed = Routed(*buffers.native.route(self._native, x.data_ptr(), rows, threads.count()))
        buffers.routed_by(*routing_of(self._router, buffers.dtype))
        return routed


def route(router: Router, buffers: Buffers, x: Tensor) -> Routed:
    """`RouterCall` once."""
    return RouterCall(router, buffers.dtype)(buffers, x)


def group(buffers: Buffers, x: Tensor, indices: Tensor, weights: Tensor, num_experts: int) -> Routed:
    """The first call of a block whose router is the family's own: it gave indices, int64 [rows, top_k] (num_experts and
    above: nobody's), and weights, [rows, top_k] of any float dtype, for x. Sets buffers.normed to x."""
    rows = _num_rows(x, buffers.hidden, buffers.dtype)
    if indices.dtype != torch.int64 or indices.dim() != 2 or indices.shape[0] != rows or weights.shape != indices.shape:
        raise ValueError(
            f"indices must be int64 [{rows}, top_k] and weights of the same shape, not {indices.dtype} "
            f"{tuple(indices.shape)} and {tuple(weights.shape)}"
        )
    weights = (weights if weights.dtype in DTYPE_CODES else weights.float()).contiguous()
    indices = indices.contiguous()
    top_k = indices.shape[1]
    routed = buffers.native.choose(
        x.data_ptr(), rows, indices.data_ptr(), weights.data_ptr(), DTYPE_CODES[weights.dtype], top_k, num_experts
    )
    buffers.routed_by(num_experts, top_k, weights.dtype, buffers.dtype)
    return Routed(*routed)


class ExpertHalf:
    """The second half: a layer's experts, and its shared expert if it has one.

    layout: an expert's record, matrices [2I, H] ([I, H] where nothing gates) and [H, I]. biases: of both matrices,
    [experts, rows of the matrix], one dtype. pool: uint8, slots of slot_bytes each, 64-byte aligned.
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
        hidden: int,
        dtype: torch.dtype,
    ) -> None:
        if layout.is_raw:
            raise ValueError(f"{layout.codec} experts are not packed: torch computes them")
        if pool.dtype != torch.uint8 or not pool.is_contiguous():
            raise ValueError(f"pool must be contiguous uint8, not {pool.dtype}")
        self.hidden, self.dtype = hidden, dtype
        self.has_shared = shared is not None
        self._held = biases, shared, pool  # keeps them alive
        self._native = extension().ExpertHalf(
            record=native.record(layout),
            activation=native.activation(activation),
            biases=_bias_addresses(biases, layout),
            shared=None if shared is None else native_shared_expert(shared, hidden, dtype),
            pool=pool.data_ptr(),
            pool_bytes=pool.numel(),
            slot_bytes=slot_bytes,
            hidden=hidden,
            dtype=DTYPE_CODES[dtype],
        )

    def __call__(
        self,
        buffers: Buffers,
        rows: int,
        experts: Sequence[int],
        slots: Sequence[int],
        precisions: Sequence[Precision] | None,
        *,
        first: bool,
        last: bool,
        out: Tensor | None,
        add_residual: bool,
    ) -> None:
        """Computes all pairs of these experts, some of those that were routed, from these slots of the pool.

        precisions: of each expert; None: all FULL. first: computes the shared expert too, so it may name no experts.
        last: sums the experts in rank order, adds the shared expert, adds buffers.residual if add_residual, and writes
        out, [rows, hidden] or [rows, 1, hidden].
        """
        if out is not None and (_num_rows(out, self.hidden, self.dtype) != rows or not last):
            raise ValueError(f"out must have {rows} rows, and is written by the last call only")
        self._native.run(
            buffers.native,
            rows,
            experts,
            slots,
            precisions or (),
            first,
            last,
            0 if out is None else out.data_ptr(),
            add_residual,
            threads.count(),
        )


def scratch_bytes(
    layouts: Iterable[RecordLayout],
    tokens: int,
    hidden: int,
    widest_input: int,
    num_threads: int,
    num_experts: int = 512,
) -> int:
    """The most bytes of scratch that the kernels of a forward of at most `tokens` tokens keep, on the selected
    instruction set; `Buffers.nbytes` is apart. layouts: of the experts' records (raw ones take none). widest_input: the
    most columns of any dense matrix, the one that takes all heads included. num_experts: the most of a layer."""
    records = [native.record(layout) for layout in dict.fromkeys(layouts) if not layout.is_raw]
    return int(extension().scratch_bytes(records, tokens, hidden, widest_input, num_experts, num_threads))


def _num_rows(x: Tensor, hidden: int, dtype: torch.dtype) -> int:
    """Rows of x [rows, hidden] or [rows, 1, hidden]."""
    shape = x.shape
    if x.dtype is not dtype or not x.is_contiguous() or shape[-1] != hidden or shape[1:-1] not in ((), (1,)):
        raise ValueError(f"rows must be contiguous {dtype} [rows, {hidden}], not {x.dtype} {tuple(shape)}")
    return shape[0]


def _bias_addresses(biases: tuple[Tensor, Tensor] | None, layout: RecordLayout) -> tuple[int, int, int, int]:
    if biases is None:
        return 0, 0, 0, 0
    dtype, count = biases[0].dtype, len(biases[0])
    for bias, spec in zip(biases, layout.matrices):
        if bias.dtype != dtype or dtype not in DTYPE_CODES or bias.shape != (count, spec.rows):
            raise ValueError(f"biases of {spec.name} must be [{count}, {spec.rows}] of one dtype, not {bias.dtype}")
        if not bias.is_contiguous():
            raise ValueError(f"biases of {spec.name} must be contiguous")
    return biases[0].data_ptr(), biases[1].data_ptr(), DTYPE_CODES[dtype], count
