"""How fast a model will be, before anything is downloaded: tokens a second and time to the first one, at a budget.

    compute    the bytes that a token reads, at the kernels' speed, and what the interpreter takes
    transfer   the bytes of experts that are not in memory, at the disk's speed
    a token    the longer of both, and OVERLAP_LOSS of the shorter

Hit rates are those of LRU caches of a layer each on recorded routing, of a family's own trace where there is one; short
traces and other texts move them by some points, so every estimate has a low and a high one.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

# Of experts needed, how many a cache of this share of a layer's experts holds. Replayed with `fate.sim.curves` over
# decoded tokens, first accesses apart: https://github.com/Helldez/BigMoeOnEdge (64 to 128 tokens) and
# https://github.com/sqliteai/warp (300 tokens); DeepSeek-V2-Lite and Qwen1.5-MoE: fate.tools.synth.routing.
SHARES = (0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
HITS: dict[str, tuple[float, ...]] = {
    "qwen3_moe": (0.390, 0.565, 0.780, 0.849, 0.896, 0.957, 0.985, 0.996, 1.0, 1.0, 1.0),
    "gemma4": (0.370, 0.570, 0.766, 0.822, 0.870, 0.946, 0.983, 0.997, 1.0, 1.0, 1.0),
    "gpt_oss": (0.510, 0.686, 0.848, 0.886, 0.911, 0.960, 0.991, 0.999, 1.0, 1.0, 1.0),
    "olmoe": (0.187, 0.351, 0.555, 0.611, 0.654, 0.737, 0.813, 0.879, 0.956, 0.995, 1.0),
    "kimi_linear": (0.438, 0.600, 0.732, 0.793, 0.836, 0.899, 0.943, 0.975, 0.998, 1.0, 1.0),
    "qwen2_moe": (0.100, 0.200, 0.370, 0.450, 0.510, 0.620, 0.720, 0.800, 0.890, 0.965, 1.0),
    "deepseek_v2": (0.100, 0.200, 0.370, 0.450, 0.510, 0.615, 0.700, 0.790, 0.900, 0.965, 1.0),
}
_ALIKE = {"qwen3_5_moe": "qwen3_moe", "qwen3_next": "qwen3_moe", "gemma4_text": "gemma4"}

# Fitted to full-size Qwen1.5-MoE at 25, 50, 75 and 100% from a disk of 2.2 GB/s, AVX-512: 6.1, 11.0, 15.4, 18.8 tok/s
# where docs/results/own-time.jsonl has 7.5, 9.9, 14.4, 20.5.
OVERLAP_LOSS = 0.35  # of the shorter of compute and transfer: misses come in bursts
KERNEL_SHARE = 0.9  # of one large matrix's speed that a model's matrices reach
LAYER_S, MISS_S = 0.0002, 0.0002  # of the interpreter, a layer and a missing expert
WASTED = 0.2  # of the bytes read, for predictions that did not come true
IMPORTS_S = 4.0  # torch and transformers
UNKNOWN_FACTOR = 0.15  # how far an estimate without any uncertainty of hits may be off


@dataclass(frozen=True)
class Machine:
    """kernel_gb_per_s: at which one token's product reads packed weights from memory. prefill_gmacs: multiply-adds a
    second of many tokens. disk_gb_per_s: of large reads past the page cache."""

    kernel_gb_per_s: float
    prefill_gmacs: float
    disk_gb_per_s: float


@dataclass(frozen=True)
class Work:
    """What a token and a prompt of a model take. dense_bytes: of the weights that every token reads. expert_bytes: of
    one record. top_k: experts of a token in one of `layers` layers of `num_experts`."""

    model_type: str
    dense_bytes: int
    expert_bytes: int
    expert_weights: int
    dense_weights: int
    top_k: int
    layers: int
    num_experts: int


@dataclass(frozen=True)
class Estimate:
    """At one budget. share: of the experts in memory. Each: expected, low, high."""

    share: float
    hits: tuple[float, float, float]
    tokens_per_s: tuple[float, float, float]
    first_token_s: tuple[float, float, float]


def hit_rates(model_type: str, share: float) -> tuple[float, float, float]:
    """(expected, low, high) share of needed experts that are in memory."""
    every = [_interpolated(row, share) for row in HITS.values()]
    own = HITS.get(_ALIKE.get(model_type, model_type))
    if own is None:
        return sum(every) / len(every), min(every), max(every)
    expected = _interpolated(own, share)
    spread = 0.25 * (1 - expected)  # between texts of one model, by the traces' halves
    return expected, expected - spread, expected + spread


def estimate(work: Work, machine: Machine, share: float, prompt: int = 128) -> Estimate:
    """share: of the experts that are in memory, 0 to 1."""
    hits = hit_rates(work.model_type, share)
    speeds = [1 / _token_s(work, machine, rate) for rate in hits]
    first = _first_token_s(work, machine, share, prompt)
    return Estimate(
        share,
        hits,
        (speeds[0], speeds[1] * (1 - UNKNOWN_FACTOR), speeds[2] * (1 + UNKNOWN_FACTOR)),
        (first, first * (1 - 2 * UNKNOWN_FACTOR), first * (1 + 2 * UNKNOWN_FACTOR)),
    )


def _token_s(work: Work, machine: Machine, hits: float) -> float:
    needed = work.top_k * work.layers
    missing = needed * (1 - hits)
    read = work.dense_bytes + needed * work.expert_bytes
    compute = read / machine.kernel_gb_per_s / KERNEL_SHARE / 1e9 + work.layers * LAYER_S + missing * MISS_S
    transfer = missing * work.expert_bytes * (1 + WASTED) / machine.disk_gb_per_s / 1e9
    return max(compute, transfer) + OVERLAP_LOSS * min(compute, transfer)


def _first_token_s(work: Work, machine: Machine, share: float, prompt: int) -> float:
    """After launch: imports, dense weights, and the experts of a prompt, nearly all of them, from the disk."""
    touched = 1 - (1 - work.top_k / work.num_experts) ** prompt
    experts = work.layers * work.num_experts * touched
    transfer = experts * work.expert_bytes / machine.disk_gb_per_s / 1e9
    macs = prompt * (work.dense_weights + work.layers * work.top_k * work.expert_weights)
    compute = macs / machine.prefill_gmacs / 1e9
    loading = work.dense_bytes / machine.disk_gb_per_s / 1e9
    return IMPORTS_S + loading + max(compute, transfer) + OVERLAP_LOSS * min(compute, transfer)


def _interpolated(row: tuple[float, ...], share: float) -> float:
    if share <= SHARES[0]:
        return row[0] * max(share, 0.0) / SHARES[0]
    at = min(bisect_left(SHARES, share), len(SHARES) - 1)
    low, high = SHARES[at - 1], SHARES[at]
    part = min((share - low) / (high - low), 1.0)
    return row[at - 1] + part * (row[at] - row[at - 1])
