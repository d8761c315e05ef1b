"""Each kernel alone, at the shapes of models: GB/s and GFLOP/s beside what this machine can do, error against float64.

Weights lie in memory several times the size of the last-level cache and every call reads others, as in a model.
The bound of a call is the longer of its weights' bytes over the read bandwidth and its operations over the speed of an
int8 matrix product, both measured here, the latter as torch's product of square matrices. Activations are bfloat16;
errors are of float32 activations, which no rounding of results adds to.

>>> document = measure_kernels([SHAPES["olmoe-1b-7b"]], tokens=(1, 16), repeats=5)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fate import kernels
from fate.bench.environment import environment
from fate.bench.kernel_shapes import Linear, ModelShape
from fate.core import Precision
from fate.kernels import reference
from fate.store.format import RecordLayout
from fate.store.plan import packed_layout
from fate.tools.diagnosis import memory_read_gb_per_s
from fate.tools.synth.store import Noise
from fate.units import GIB, MIB

TOKENS = (1, 4, 16, 64, 512)
DEPTHS = {"INT4": ("int4", Precision.FULL), "INT2": ("int4", Precision.INT2), "INT8": ("int8", Precision.FULL)}
_EXPERTS_AT, _LINEAR_AT = ("INT4", "INT2", "INT8"), ("INT4", "INT8")
COLD_BYTES, _MOST_BYTES = 192 * MIB, 2 * GIB  # of weights: far more than a cache holds, and what a bench may take
GEMM_SIZE = 2048
_ERROR_TOKENS = 8
LEAST_S = 0.02  # a measurement is as many calls as take this long

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Limits:
    """What this machine can do with all of torch's threads."""

    read_bytes_per_s: float
    int8_ops_per_s: float

    def bound_s(self, weight_bytes: float, operations: float) -> float:
        return max(weight_bytes / self.read_bytes_per_s, operations / self.int8_ops_per_s)

    def best(self, other: Limits) -> Limits:
        return Limits(
            max(self.read_bytes_per_s, other.read_bytes_per_s), max(self.int8_ops_per_s, other.int8_ops_per_s)
        )


@dataclass(frozen=True)
class Work:
    """One kernel at one shape, depth and number of tokens: `call(turn)` does it on the weights of that turn."""

    kernel: str
    matrices: str
    depth: str
    tokens: int
    weight_bytes: float
    operations: float
    error: float
    call: Callable[[int], object]

    def timed(self, repeats: int) -> dict[str, Any]:
        seconds = _seconds(self.call, repeats)
        middle = median(seconds)
        return {
            "kernel": self.kernel,
            "matrices": self.matrices,
            "precision": self.depth,
            "tokens": self.tokens,
            "seconds": middle,
            "seconds_range": [min(seconds), max(seconds)],
            "gb_per_s": self.weight_bytes / middle / 1e9,
            "gflop_per_s": self.operations / middle / 1e9,
            "weight_bytes": self.weight_bytes,
            "operations": self.operations,
            "relative_error": self.error,
        }


def measure_kernels(
    shapes: Sequence[ModelShape],
    tokens: Sequence[int] = TOKENS,
    repeats: int = 7,
    progress: Progress = lambda done, total, what: None,
) -> dict[str, Any]:
    """The JSON-ready document: limits of the machine, and for each shape a row per kernel, precision and tokens."""
    noise = Noise(0)
    progress(0, 1, "the machine's limits")
    limits = machine_limits()
    total = len(shapes) * len(tokens) * len(_EXPERTS_AT)
    total += sum(len(_LINEAR_AT) * len(_tokens_of(linear, tokens)) for shape in shapes for linear in shape.linears)
    done = 0
    found: dict[str, list[dict[str, Any]]] = {}
    for shape in shapes:
        rows = found[shape.name] = []
        for work in (*_linear_works(shape, tokens, noise), *_expert_works(shape, tokens, noise)):
            rows.append(work.timed(repeats))
            done += 1
            progress(done, total, f"{shape.name}, {work.kernel} at {work.depth}")
    limits = limits.best(machine_limits())  # at both ends: what else runs meanwhile lowers them for a while
    for row in (row for rows in found.values() for row in rows):
        row["share_of_bound"] = limits.bound_s(row["weight_bytes"], row["operations"]) / row["seconds"]
    return {
        "bench": "kernels",
        "limits": asdict(limits),
        "shapes": found,
        "repeats": repeats,
        "environment": environment(),
    }


def machine_limits() -> Limits:
    """Read bandwidth (best of sums far larger than the caches) and int8 matrix product (best of torch's)."""
    left, right = (torch.randint(-127, 128, (GEMM_SIZE, GEMM_SIZE), dtype=torch.int8) for _ in range(2))
    seconds = min(_seconds(lambda turn: torch._int_mm(left, right), 5))
    return Limits(memory_read_gb_per_s() * 1e9, 2 * GEMM_SIZE**3 / seconds)


def _tokens_of(linear: Linear, tokens: Sequence[int]) -> Sequence[int]:
    return tokens[:1] if linear.once else tokens


def _linear_works(shape: ModelShape, tokens: Sequence[int], noise: Noise) -> Iterator[Work]:
    for linear in shape.linears:
        for depth in _LINEAR_AT:
            codec, precision = DEPTHS[depth]
            layout = packed_layout(codec, linear.rows, linear.cols)
            copies = -(-COLD_BYTES // layout.record_bytes)
            packed = [noise.record(layout, item) for item in range(copies)]
            error = _linear_error(layout, packed[0], noise, precision)
            for count in _tokens_of(linear, tokens):
                x = _activations(noise, count, linear.cols).bfloat16()

                def call(
                    turn: int, x: Tensor = x, packed: list[Tensor] = packed, layout: RecordLayout = layout
                ) -> object:
                    return kernels.linear(x, packed[turn % len(packed)], layout)

                operations = 2.0 * linear.rows * linear.cols * count
                name = f"{linear.name} [{linear.rows}, {linear.cols}]"
                yield Work("linear", name, depth, count, layout.payload_bytes, operations, error, call)


def _expert_works(shape: ModelShape, tokens: Sequence[int], noise: Noise) -> Iterator[Work]:
    """Tokens choose their experts at random; `turn` moves every choice on, so that a call finds its experts cold."""
    for depth in _EXPERTS_AT:
        codec, precision = DEPTHS[depth]
        layout = shape.expert_layout(codec)
        experts = max(shape.num_experts_per_tok, min(shape.num_experts, _MOST_BYTES // layout.record_bytes))
        pool = torch.cat([noise.record(layout, item) for item in range(experts)])
        error = _expert_error(layout, pool, noise, precision)
        read = layout.split if precision is Precision.INT2 else layout.payload_bytes
        for count in tokens:
            calls = [ExpertCall(layout, pool, shape, experts, count, precision, noise, turn) for turn in range(experts)]
            used = sum(call.experts_used for call in calls) / len(calls)
            operations = 2.0 * layout.weights * count * shape.num_experts_per_tok
            name = f"{experts} x [{2 * shape.intermediate}, {shape.hidden}], top {shape.num_experts_per_tok}"

            def call(turn: int, calls: list[ExpertCall] = calls) -> object:
                return calls[turn % len(calls)].run()

            yield Work("experts", name, depth, count, used * read, operations, error, call)


class ExpertCall:
    """One routing of `count` tokens to the experts of a pool, ready to be computed."""

    def __init__(
        self,
        layout: RecordLayout,
        pool: Tensor,
        shape: ModelShape,
        experts: int,
        count: int,
        precision: Precision,
        noise: Noise,
        turn: int,
    ) -> None:
        top_k = shape.num_experts_per_tok
        generator = torch.Generator().manual_seed(turn)
        chosen = torch.rand(count, experts, generator=generator).topk(top_k).indices
        if count == 1:  # neighbours in turn: all are read before one is read again
            chosen = (torch.arange(top_k) + turn * top_k).remainder(experts)[None]
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=experts)
        used = counts.nonzero().flatten().tolist()
        self.experts_used = len(used)
        self._x = _activations(noise, count, shape.hidden).bfloat16()
        self._pool, self._layout = pool, layout
        self.offsets = [expert * layout.record_bytes for expert in used]
        self._precisions = [precision] * len(used)
        self._pair_offsets = [0, *counts[used].cumsum(0).tolist()]
        self._pairs = torch.stack((order // top_k, order % top_k), dim=1).int()
        self._rows = torch.empty(count, top_k, shape.hidden)

    def run(self) -> Tensor:
        kernels.experts(
            self._x,
            self._pool,
            self._layout,
            self.offsets,
            self._precisions,
            self._pair_offsets,
            self._pairs,
            self._rows,
        )
        return self._rows


def _linear_error(layout: RecordLayout, packed: Tensor, noise: Noise, precision: Precision) -> float:
    x = _activations(noise, _ERROR_TOKENS, layout.matrices[0].cols)
    exact = reference.linear(x, packed, layout, 0, precision, dtype=torch.float64)
    return _relative_error(kernels.linear(x, packed, layout, 0, precision), exact)


def _expert_error(layout: RecordLayout, pool: Tensor, noise: Noise, precision: Precision) -> float:
    x = _activations(noise, _ERROR_TOKENS, layout.matrices[0].cols)
    pairs = torch.tensor([[token, 0] for token in range(_ERROR_TOKENS)], dtype=torch.int32)
    ours = torch.empty(_ERROR_TOKENS, 1, layout.matrices[1].rows)
    exact = ours.double()
    for run, rows in ((kernels.experts, ours), (reference.experts, exact)):
        run(x, pool, layout, [0], [precision], [0, _ERROR_TOKENS], pairs, rows, kernels.SWIGLU)
    return _relative_error(ours, exact)


def _activations(noise: Noise, tokens: int, cols: int) -> Tensor:
    """float32 [tokens, cols], standard normal."""
    return noise.normal(1, tokens * cols).view(tokens, cols)


def _relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def _seconds(call: Callable[[int], object], repeats: int) -> list[float]:
    """Seconds of one call, measured `repeats` times after a warm-up; turns go on through all calls."""
    start = time.perf_counter()
    call(0)
    each = max(1, int(LEAST_S / max(time.perf_counter() - start, 1e-6)))
    seconds, turn = [], 1
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(each):
            call(turn)
            turn += 1
        seconds.append((time.perf_counter() - start) / each)
    return seconds
