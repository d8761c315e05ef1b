"""From measured runs to the rows of a comparison: medians, paired ratios, bounds. Arithmetic only.

>>> paired_ratio([10.0, 12.0, 14.0], [5.0, 4.0, 7.0])
{'median': 2.0, 'range': [2.0, 3.0]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from fate.bench.limits import Compute, bound_s
from fate.bench.passes import Pass
from fate.core import StepStats
from fate.runtime.session import RunStats

BASELINES = ("load-on-demand-uncached", "load-on-demand", "eap")
PHASES = ("decode", "prefill")


@dataclass(frozen=True)
class Phase:
    """One phase of all requests of a run: wall-clock seconds, tokens, counters."""

    seconds: float
    tokens: int
    stats: StepStats

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Run:
    """One measurement of one system: every request once. ttft_s: mean over requests. layers: counters of each MoE
    layer. notes: what the engine decided by measurement."""

    prefill: Phase
    decode: Phase
    ttft_s: float
    layers: tuple[RunStats, ...]
    slots: int
    notes: tuple[str, ...] = ()

    def phase(self, name: str) -> Phase:
        return self.prefill if name == "prefill" else self.decode


def make_run(passes: Sequence[Pass], layers: Sequence[RunStats], slots: int, notes: Sequence[str]) -> Run:
    prefill = Phase(
        sum(p.ttft_s for p in passes),
        sum(p.prompt_tokens for p in passes),
        sum((p.stats.prefill for p in passes), StepStats()),
    )
    decode = Phase(
        sum(p.decode_s for p in passes),
        sum(p.new_tokens for p in passes),
        sum((p.stats.decode for p in passes), StepStats()),
    )
    return Run(prefill, decode, prefill.seconds / len(passes), tuple(layers), slots, tuple(notes))


def system_row(
    runs: Mapping[str, Sequence[Run]], system: str, compute: Compute, bytes_per_s: float, minimum: Mapping[str, float]
) -> dict[str, Any]:
    """What the JSON says of one system in one cell. runs: of every system of the cell, one a repeat, in order.
    bytes_per_s: of the link. minimum: bytes a token, by phase, that no cache of this size could do without."""
    own = runs[system]
    row: dict[str, Any] = {
        "slots": own[-1].slots,
        "notes": sorted({note for run in own for note in run.notes}),
        "ttft_s": median(run.ttft_s for run in own),
        "layer_hit_rate": _layer_hit_rates(own),
        "repeats": [_repeat(run) for run in own],
    }
    for name in PHASES:
        seconds_per_token = compute.prefill_s_per_token if name == "prefill" else compute.decode_s_per_token
        row[name] = _phase_row([run.phase(name) for run in own], seconds_per_token, bytes_per_s)
        row[name]["speedup_over"] = {
            baseline: paired_ratio(_speeds(own, name), _speeds(runs[baseline], name))
            for baseline in BASELINES
            if baseline in runs and baseline != system
        }
        if name in minimum:
            row[name]["belady_bytes_per_token"] = minimum[name]
            row[name]["bytes_over_belady"] = row[name]["bytes_per_token"] / minimum[name] if minimum[name] else None
    return row


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Ratios of measurements of the same repeat, which ran under the same conditions: their median and range."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return {"median": median(ratios), "range": [ratios[0], ratios[-1]]}


def _phase_row(phases: Sequence[Phase], compute_s_per_token: float, bytes_per_s: float) -> dict[str, Any]:
    """Speeds are medians, counters are summed over repeats."""
    stats = sum((phase.stats for phase in phases), StepStats())
    tokens = sum(phase.tokens for phase in phases)
    speeds = sorted(phase.tokens_per_s for phase in phases)
    bounds = [bound_s(compute_s_per_token * p.tokens, p.stats.bytes_moved, bytes_per_s) for p in phases]
    return {
        "tokens_per_s": median(speeds),
        "tokens_per_s_range": [speeds[0], speeds[-1]],
        "hit_rate": stats.hit_rate,
        "recall": stats.recall if stats.asked else None,
        "coverage": stats.coverage,
        "bytes_per_token": stats.bytes_moved / tokens,
        # What one phase reads ahead and the next uses would count as less than no waste in the latter.
        "wasted_bytes_per_token": max(stats.wasted_bytes, 0) / tokens,
        "stall_share": stats.stall_share,
        "bound_s_per_token": median(bound / p.tokens for bound, p in zip(bounds, phases)),
        "time_over_bound": median(p.seconds / bound for bound, p in zip(bounds, phases)),
    }


def _speeds(runs: Sequence[Run], phase: str) -> list[float]:
    return [run.phase(phase).tokens_per_s for run in runs]


def _layer_hit_rates(runs: Sequence[Run]) -> dict[str, list[float]]:
    """By phase, the hit rate of each MoE layer over all repeats."""
    rates: dict[str, list[float]] = {}
    for name in PHASES:
        layers = zip(*(run.layers for run in runs))
        rates[name] = [sum((getattr(stats, name) for stats in layer), StepStats()).hit_rate for layer in layers]
    return rates


def _repeat(run: Run) -> dict[str, Any]:
    return {
        name: {"seconds": run.phase(name).seconds, "tokens": run.phase(name).tokens, **_counters(run.phase(name).stats)}
        for name in PHASES
    }


def _counters(stats: StepStats) -> dict[str, Any]:
    return {name: value for name, value in asdict(stats).items() if name not in ("tokens", "forwards")}
