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
from fate.engine.session import RunStats

BASELINES = ("load-on-demand-uncached", "load-on-demand", "eap")
CACHING_BASELINES = BASELINES[1:]
ORACLE = "fate-oracle"
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
        phase = row[name] = _phase_row([run.phase(name) for run in own], name, compute, bytes_per_s)
        phase["speedup_over"] = {
            baseline: paired_ratio(_speeds(own, name), _speeds(runs[baseline], name))
            for baseline in (*BASELINES, ORACLE)
            if baseline in runs and baseline != system
        }
        for baseline in set(CACHING_BASELINES) & set(phase["speedup_over"]):
            theirs = [run.phase(name) for run in runs[baseline]]
            phase["speedup_over"][baseline]["at_most"] = _at_most(theirs, name, compute, bytes_per_s)
        if ORACLE in runs and is_ours(system):
            perfect = _counted([run.phase(name) for run in runs[ORACLE]]).hit_rate
            phase["hits_of_perfect"] = phase["hit_rate"] / perfect if perfect else None
        if name in minimum:
            phase["belady_bytes_per_token"] = minimum[name]
            phase["bytes_over_belady"] = phase["bytes_per_token"] / minimum[name] if minimum[name] else None
    return row


def is_ours(system: str) -> bool:
    """Called fate, or fate-..., and no oracle."""
    return system.split("-")[0] == "fate" and not system.startswith(ORACLE)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Ratios of measurements of the same repeat, which ran under the same conditions: their median and range."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return {"median": median(ratios), "range": [ratios[0], ratios[-1]]}


def _phase_row(phases: Sequence[Phase], name: str, compute: Compute, bytes_per_s: float) -> dict[str, Any]:
    """Speeds are medians, counters are summed over repeats. link_bound: the bytes moved take longer than computing."""
    stats, tokens = _counted(phases), sum(phase.tokens for phase in phases)
    compute_s = compute.s_per_token(name)
    predicted_s = _predicted_s(stats, compute, bytes_per_s)
    speeds = sorted(phase.tokens_per_s for phase in phases)
    bounds = [bound_s(compute_s * p.tokens, p.stats.bytes_moved, bytes_per_s) for p in phases]
    return {
        "tokens_per_s": median(speeds),
        "tokens_per_s_range": [speeds[0], speeds[-1]],
        "hit_rate": stats.hit_rate,
        "recall": stats.recall if stats.asked else None,
        "coverage": stats.coverage if stats.asked else None,
        "bytes_per_token": stats.bytes_moved / tokens,
        # What one phase reads ahead and the next uses would count as less than no waste in the latter.
        "wasted_bytes_per_token": max(stats.wasted_bytes, 0) / tokens,
        "stall_share": stats.stall_share,
        "bound_s_per_token": median(bound / p.tokens for bound, p in zip(bounds, phases)),
        "time_over_bound": median(p.seconds / bound for bound, p in zip(bounds, phases)),
        "link_bound": stats.bytes_moved / bytes_per_s > compute_s * tokens,
        "predicted_link_share": predicted_s / (compute_s * tokens) if stats.asked else None,
    }


def _predicted_s(stats: StepStats, compute: Compute, bytes_per_s: float) -> float:
    """What the link needs for all that was predicted and not cached: experts that proved right, whether or not they
    arrived (counted as records, for what did not arrive has no bytes), and the bytes read for those that did not."""
    return stats.covered * compute.transfer_s(bytes_per_s) + max(stats.wasted_bytes, 0) / bytes_per_s


def _at_most(theirs: Sequence[Phase], name: str, compute: Compute, bytes_per_s: float) -> float:
    """What overlapping transfers with compute could gain over these phases of a baseline."""
    compute_s = compute.s_per_token(name) * sum(phase.tokens for phase in theirs)
    return overlap_ceiling(compute_s, _counted(theirs), compute.transfer_s(bytes_per_s))


def overlap_ceiling(compute_s: float, stats: StepStats, transfer_s: float) -> float:
    """(1 + m rho) / max(1, u rho), both in seconds: a baseline that waits for each of its misses (m a layer), against
    one that moves what the baseline's cache lacked (u a layer; m where nothing is prefetched), perfectly overlapped.
    See docs/overlap.md.

    >>> overlap_ceiling(1.0, StepStats(accesses=10, hits=6, uncached=4), 0.25)
    2.0
    """
    return (compute_s + stats.misses * transfer_s) / max(compute_s, stats.uncached * transfer_s)


def _counted(phases: Sequence[Phase]) -> StepStats:
    return sum((phase.stats for phase in phases), StepStats())


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
    """What `repeated_run` needs."""
    return {name: _repeated_phase(run.phase(name), [getattr(layer, name) for layer in run.layers]) for name in PHASES}


def _repeated_phase(phase: Phase, layers: Sequence[StepStats]) -> dict[str, Any]:
    counters = {name: value for name, value in asdict(phase.stats).items() if name not in ("tokens", "forwards")}
    by_layer = {name: [getattr(stats, name) for stats in layers] for name in ("accesses", "hits")}
    return {"seconds": phase.seconds, "tokens": phase.tokens, **counters, "by_layer": by_layer}


def repeated_run(repeat: Mapping[str, Any], num_requests: int, slots: int, notes: Sequence[str]) -> Run:
    """The run that `repeat`, of a row's "repeats", tells of; of its layers only accesses and hits are known."""
    phases: dict[str, Phase] = {}
    layers: dict[str, list[StepStats]] = {}
    for name in PHASES:
        counters = dict(repeat[name])
        seconds, tokens, by_layer = (counters.pop(key) for key in ("seconds", "tokens", "by_layer"))
        phases[name] = Phase(seconds, tokens, StepStats(tokens=tokens, **counters))
        layers[name] = [
            StepStats(accesses=accesses, hits=hits)
            for accesses, hits in zip(by_layer["accesses"], by_layer["hits"], strict=True)
        ]
    pairs = zip(layers["prefill"], layers["decode"], strict=True)
    ttft_s = phases["prefill"].seconds / num_requests
    return Run(
        phases["prefill"], phases["decode"], ttft_s, tuple(RunStats(*pair) for pair in pairs), slots, tuple(notes)
    )
