"""What `fate run --explain` prints of a `fate.tools.explanation.Explanation`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fate.cli.output import print_table, print_words
from fate.core import StepStats
from fate.tools.explanation import Explanation, PhaseExplanation, format_ms, wasted_bytes
from fate.units import format_bytes

_TIMES = ("total", "experts", "stall", "predict")
_RATES = ("hit rate", "recall@k", "coverage")
_READS = ("demanded", "prefetched", "wasted")


def print_explanation(console: Console, explanation: Explanation) -> None:
    """A line for the prompt, a table for decoding, and in words what prefetching gained or lost."""
    if explanation.prefill.stats.tokens:
        print_words(console, _prompt_line(explanation.prefill))
    if tokens := explanation.decode.stats.tokens:
        unit, unit_bytes = _unit(explanation.decode)
        print_words(console, f"decoding, mean of {tokens} tokens: times in ms, reads in {unit}")
        print_table(console, _table(explanation.decode, unit_bytes), fold=False)
    print_words(console, explanation.words)


def _prompt_line(phase: PhaseExplanation) -> str:
    layers = phase.all_layers
    line = (
        f"prompt, {phase.stats.tokens} tokens in {format_ms(phase.stats.total_s)}: experts "
        f"{format_ms(layers.expert_compute_s)}, stall {format_ms(layers.stall_s)}, predict "
        f"{format_ms(layers.predict_s)}, outside the experts {format_ms(phase.outside_s)}; hit rate "
        f"{layers.hit_rate:.1%}, {format_bytes(layers.bytes_moved)} read"
    )
    return f"{line}, {layers.prefetch_bytes / layers.bytes_moved:.0%} of it prefetched" if layers.bytes_moved else line


def _table(phase: PhaseExplanation, unit_bytes: int) -> Table:
    """A row for each MoE layer, one for all of them, one for the rest."""
    table = Table("layer", *_TIMES, *_RATES, *_READS, "gain", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for layer, stats in enumerate(phase.layers):
        table.add_row(str(layer), *_cells(phase, stats, phase.gain_s(layer), unit_bytes))
    table.add_row("all layers", *_cells(phase, phase.all_layers, phase.gain_s(), unit_bytes))
    table.add_row("outside the experts", _ms(phase.outside_s, phase.stats.tokens))
    return table


def _cells(phase: PhaseExplanation, stats: StepStats, gain_s: float | None, unit_bytes: int) -> list[str]:
    tokens = phase.stats.tokens
    times = (stats.total_s, stats.expert_compute_s, stats.stall_s, stats.predict_s)
    rates = (stats.hit_rate, stats.recall if stats.asked else None, phase.coverage(stats))
    reads = (stats.demand_bytes, stats.prefetch_bytes, wasted_bytes(stats))
    return [
        *(_ms(seconds, tokens) for seconds in times),
        *("-" if rate is None else f"{rate:.1%}" for rate in rates),
        *(f"{read / tokens / unit_bytes:.2f}" for read in reads),
        "-" if gain_s is None else f"{1000 * gain_s / tokens:+.2f}",
    ]


def _ms(seconds: float, tokens: int) -> str:
    return f"{1000 * seconds / tokens:.2f}"


def _unit(phase: PhaseExplanation) -> tuple[str, int]:
    """MiB, or KiB where that would leave hardly a digit."""
    largest = max((stats.bytes_moved for stats in phase.layers), default=0)
    return ("MiB", 1 << 20) if largest >= phase.stats.tokens << 20 else ("KiB", 1 << 10)
