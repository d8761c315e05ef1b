"""A layer's small operations on any number of rows, in one native call each.

Each rounds to the activations' dtype where the model's own modules round. A row's bits depend on nothing but the row:
not on the other rows, not on the number of threads. `decode` joins the same operations into two calls a layer, so a
model gives the same bits on both paths. Tensors are contiguous, on the CPU and of one dtype (float32, bfloat16 or
float16). The compiled extension must be there. Wrong shapes and dtypes raise ValueError.

>>> logits, scores, indices = route_rows(Router(weight, 8, True, torch.float32), x)
>>> out = add_gated(out, gated_mlp(x, gate, up, down), x, share)
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fate.kernels import native, threads
from fate.kernels.native import DTYPE_CODES
from fate.store.format import RecordLayout


class Norm(NamedTuple):
    """RMSNorm: weight * x / sqrt(mean(x^2) + eps). weight: [cols]. round_before_scale: x / rms(x) is rounded to the
    activations' dtype before it is multiplied by the weight. plus_one: 1 + weight is what it is multiplied by."""

    weight: Tensor
    eps: float
    round_before_scale: bool
    plus_one: bool = False


class PackedMatrix(NamedTuple):
    """A packed matrix. packed: uint8, the bytes of a record of one matrix. bias: [rows] or None."""

    packed: Tensor
    layout: RecordLayout
    bias: Tensor | None


class Scoring(enum.IntEnum):
    """What a router's scores are of its logits: their softmax, the sigmoid of each, or the softmax of the top_k
    largest."""

    SOFTMAX = 0
    SIGMOID = 1
    SOFTMAX_OF_TOP = 2


class Router(NamedTuple):
    """A router. weight: [experts, hidden]. Chosen experts' scores, in score_dtype, are divided by their sum if
    `renormalize`, and multiplied by `scaling`.

    float_logits: logits are not rounded to the activations' dtype. bias: [experts], added to the logits. correction:
    float32 [experts], added to the scores to choose by, but not to what counts. Experts are chosen within the best
    top_groups of `groups` groups of neighbours; a group is as good as the sum of its group_best best.
    Sources: DeepSeek-V2 (arXiv 2405.04434) for groups, DeepSeek-V3 (arXiv 2412.19437) for the correction.
    """

    weight: Tensor
    top_k: int
    renormalize: bool
    score_dtype: torch.dtype
    scoring: Scoring = Scoring.SOFTMAX
    float_logits: bool = False
    bias: Tensor | None = None
    correction: Tensor | None = None
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    scaling: float = 1.0


class SharedExpert(NamedTuple):
    """An MLP for every row: down(silu(gate x) * up x), times sigmoid(x share^T) if share [1, hidden] is given."""

    gate: PackedMatrix
    up: PackedMatrix
    down: PackedMatrix
    share: Tensor | None


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension of x, computed in float32."""
    made, cols = native_norm(norm, x.dtype), norm.weight.numel()
    x = _rows(x, cols)
    out = torch.empty_like(x)
    extension().norm_rows(made, x.data_ptr(), DTYPE_CODES[x.dtype], x.numel() // cols, out.data_ptr(), threads.count())
    return out


def route_rows(router: Router, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the router says of x [tokens, hidden]: logits [tokens, experts] of x's dtype, scores [tokens, top_k] of
    score_dtype, largest first, and whose they are, int64 [tokens, top_k] (of equal logits the lower index first)."""
    made, hidden = native_router(router, x.dtype), router.weight.shape[1]
    x = _rows(x, hidden)
    tokens = x.numel() // hidden
    logits = torch.empty(tokens, router.weight.shape[0], dtype=torch.float32 if router.float_logits else x.dtype)
    scores = torch.empty(tokens, router.top_k, dtype=router.score_dtype)
    indices = torch.empty(tokens, router.top_k, dtype=torch.int64)
    extension().route_rows(
        made,
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        tokens,
        logits.data_ptr(),
        scores.data_ptr(),
        indices.data_ptr(),
        threads.count(),
    )
    return logits, scores, indices


def multiply_few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., cols] times weight [rows, cols], summed in float32: [..., rows]. For matrices of few rows, as routers
    are: the weight is read anew for every 16 tokens."""
    _check(weight, "a weight", x.dtype, (weight.shape[0], weight.shape[-1]))
    rows, cols = weight.shape
    x = _rows(x, cols)
    out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    extension().multiply_rows(
        weight.data_ptr(),
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        rows,
        cols,
        x.numel() // cols,
        out.data_ptr(),
        threads.count(),
    )
    return out


def rank_experts(weight: Tensor, x: Tensor, limit: int) -> list[list[tuple[int, float]]]:
    """For each row of x [rows, hidden] the `limit` likeliest of softmax(x weight^T), likeliest first, with their
    probabilities. weight: [experts, hidden]."""
    _check(weight, "a router's weight", x.dtype, (weight.shape[0], weight.shape[-1]))
    experts, hidden = weight.shape
    x = _rows(x, hidden)
    ranked: list[list[tuple[int, float]]] = extension().rank_rows(
        weight.data_ptr(),
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        experts,
        hidden,
        x.numel() // hidden,
        limit,
        threads.count(),
    )
    return ranked


def gated_mlp(x: Tensor, gate: PackedMatrix, up: PackedMatrix, down: PackedMatrix) -> Tensor:
    """down(silu(gate x) * up x) of x [tokens, hidden]: [tokens, rows of down]."""
    made = [native_matrix(matrix, x.dtype) for matrix in (gate, up, down)]
    x = _rows(x, gate.layout.matrices[0].cols)
    tokens = x.numel() // x.shape[-1]
    out = torch.empty(*x.shape[:-1], down.layout.matrices[0].rows, dtype=x.dtype)
    extension().gated_rows(*made, x.data_ptr(), DTYPE_CODES[x.dtype], tokens, out.data_ptr(), threads.count())
    return out


def add_gated(experts: Tensor, shared: Tensor, x: Tensor, share: Tensor | None) -> Tensor:
    """experts + sigmoid(x share^T) * shared, or experts + shared where share is None. All [tokens, hidden]; share:
    [1, hidden]."""
    x = _rows(x, x.shape[-1])
    _check(experts, "experts", x.dtype, tuple(x.shape))
    _check(shared, "shared", x.dtype, tuple(x.shape))
    if share is not None:
        _check(share, "share", x.dtype, (1, x.shape[-1]))
    out = torch.empty_like(x)
    extension().add_gated_rows(
        experts.data_ptr(),
        shared.data_ptr(),
        x.data_ptr(),
        0 if share is None else share.data_ptr(),
        DTYPE_CODES[x.dtype],
        x.numel() // x.shape[-1],
        x.shape[-1],
        out.data_ptr(),
        threads.count(),
    )
    return out


def add_gated_logits(experts: Tensor, shared: Tensor, logits: Tensor) -> Tensor:
    """experts + sigmoid(logits) * shared, [tokens, hidden] with logits [tokens, 1]: what `add_gated` gives with the
    logits x share^T."""
    tokens, hidden = experts.shape
    experts, shared, logits = experts.contiguous(), shared.contiguous(), logits.contiguous()
    _check(shared, "shared", experts.dtype, (tokens, hidden))
    _check(logits, "logits", experts.dtype, (tokens, 1))
    out = torch.empty_like(experts)
    extension().add_gated_logits(
        experts.data_ptr(),
        shared.data_ptr(),
        logits.data_ptr(),
        DTYPE_CODES[experts.dtype],
        tokens,
        hidden,
        out.data_ptr(),
        threads.count(),
    )
    return out


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..., inner] each, rounded as between the matrices of `gated_mlp`."""
    out, up = gate.clone(memory_format=torch.contiguous_format), up.contiguous()
    _check(up, "up", out.dtype, tuple(out.shape))
    inner = out.shape[-1]
    code = DTYPE_CODES[out.dtype]
    extension().silu_times(out.data_ptr(), up.data_ptr(), code, out.numel() // inner, inner, threads.count())
    return out


def extension() -> Any:
    """The extension; ValueError where it is missing or was not selected."""
    cpu = native.extension()
    if cpu is None:
        raise ValueError(f"this needs the compiled kernels: {native.missing() or 'torch was selected instead'}")
    return cpu


def native_norm(norm: Norm | None, dtype: torch.dtype) -> Any:
    """The norm as the extension's own object, good while its weight stays where it is."""
    if norm is None:
        return extension().Norm(0, 0, 0.0, False, False)
    weight, eps, round_before_scale, plus_one = norm
    _check(weight, "a norm's weight", dtype, (weight.numel(),))
    return extension().Norm(weight.data_ptr(), weight.numel(), eps, round_before_scale, plus_one)


def native_matrix(matrix: PackedMatrix, dtype: torch.dtype) -> Any:
    """The matrix as the extension's own object, good while its tensors stay where they are."""
    packed, layout, bias = matrix
    if layout.is_raw or len(layout.matrices) != 1:
        raise ValueError(f"a packed matrix is a record of one int4 or int8 matrix, not {layout.codec}")
    if packed.dtype != torch.uint8 or not packed.is_contiguous() or packed.numel() < layout.record_bytes:
        raise ValueError(f"packed must be contiguous uint8 of at least {layout.record_bytes} bytes")
    if bias is not None:
        _check(bias, "bias", dtype, (layout.matrices[0].rows,))
    record = native.record(layout)
    return extension().PackedMatrix(record, packed.data_ptr(), 0 if bias is None else bias.data_ptr())


def native_router(router: Router, dtype: torch.dtype) -> Any:
    """The router as the extension's own object, good while its weight stays where it is."""
    weight = router.weight
    _check(weight, "a router's weight", dtype, (weight.shape[0], weight.shape[-1]))
    if router.score_dtype not in DTYPE_CODES:
        raise ValueError(f"{router.score_dtype} scores are not supported: use float32, bfloat16 or float16")
    score_code, experts = DTYPE_CODES[router.score_dtype], weight.shape[0]
    for tensor, name, wanted in ((router.bias, "bias", dtype), (router.correction, "correction", torch.float32)):
        if tensor is not None:
            _check(tensor, f"a router's {name}", wanted, (experts,))
    how = (
        int(router.scoring),
        router.float_logits,
        0 if router.bias is None else router.bias.data_ptr(),
        0 if router.correction is None else router.correction.data_ptr(),
        router.groups,
        router.top_groups,
        router.group_best,
        router.scaling,
    )
    return extension().Router(weight.data_ptr(), *weight.shape, router.top_k, router.renormalize, score_code, how)


def native_shared_expert(shared: SharedExpert, hidden: int, dtype: torch.dtype) -> Any:
    """The shared expert as the extension's own object, good while its tensors stay where they are."""
    if shared.share is not None:
        _check(shared.share, "share", dtype, (1, hidden))
    made = [native_matrix(matrix, dtype) for matrix in shared[:3]]
    return extension().SharedExpert(*made, 0 if shared.share is None else shared.share.data_ptr())


def _rows(x: Tensor, cols: int) -> Tensor:
    """x, contiguous; ValueError unless it is [..., cols] of a dtype the kernels take."""
    if x.dtype not in DTYPE_CODES or x.dim() == 0 or x.shape[-1] != cols:
        raise ValueError(f"x must be [..., {cols}] of float32, bfloat16 or float16, not {x.dtype} {tuple(x.shape)}")
    return x.contiguous()


def _check(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous {dtype} {shape}, not {tensor.dtype} {tuple(tensor.shape)}")
