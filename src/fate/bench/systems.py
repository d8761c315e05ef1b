"""Systems x budgets x links on given prompts: the comparison a claim of speed is made from.

In one cell (a link, a budget) the systems alternate, A B A B, so that whatever drifts drifts for all. Each measurement
is an engine of its own on the same dense weights. It runs the recorded requests, then some of them again (enough steps
for an engine to decide whether prefetching pays), and then the measured ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fate.bench.comparison import DISK, Comparison, Link, Workload
from fate.bench.limits import Compute, compute_limit, disk_bytes_per_s
from fate.bench.minimum import Minimum, equal_capacities, split_requests
from fate.bench.passes import Pass, feed, trace_last_token
from fate.bench.quality import Quality
from fate.bench.summary import Run, make_run
from fate.loading import ensure_profile, load
from fate.runtime.session import FateModel
from fate.store.format import StoreHeader
from fate.store.reader import StoreReader
from fate.systems import resolve_system
from fate.transfer.link import parse_link

_WITHOUT_GUESSES = "load-on-demand"

Progress = Callable[[int, int, str], None]


@dataclass
class Cell:
    """What was measured on one link with one budget: of each system, a run a repeat. minimum: bytes a token, by phase
    (see `minimum.Minimum`). timelines, perplexity: by system, where asked for."""

    link: Link
    experts: str
    runs: dict[str, list[Run]]
    minimum: dict[str, float] = field(default_factory=dict)
    timelines: dict[str, dict[str, Any]] = field(default_factory=dict)
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class Measured:
    """Everything so far; only finished cells are in it. disk_bytes_per_s: the best that was seen."""

    num_experts: int = 0
    compute: Compute | None = None
    disk_bytes_per_s: float = 0.0
    cells: list[Cell] = field(default_factory=list)


class SystemsBench:
    """`run` fills `measured`, which stands whatever interrupts it."""

    def __init__(self, comparison: Comparison, workload: Workload, quality: Quality | None = None) -> None:
        self.measured = Measured()
        self._comparison = comparison
        self._workload = workload
        self._quality = quality
        self._progress: Progress = lambda *_: None
        self._steps_done = 0

    def run(self, store: Path, progress: Progress) -> None:
        """progress: called with (steps done, steps in all, what comes next). Raises what loading raises, and
        LinkMemoryError where the records of an emulated link do not fit."""
        self._progress = progress
        progress(0, self._num_steps(), "loading")
        context = self._workload.context
        with load(store, system=_WITHOUT_GUESSES, max_context=context, on_plan=lambda *_: None) as model:
            reader = model.fate.reader
            if any(resolve_system(name).needs_profile for name in self._comparison.systems):
                ensure_profile(model)
            self._measure_disk(reader)
            minimum = self._measure_compute(model, reader.header)
            if self._quality is not None:
                self._step("perplexity of an exact system")
                self._quality.measure_exact(model)
            for link in self._links():
                for experts in self._comparison.experts:
                    cell = self._measure_cell(model, link, experts)
                    cell.minimum = minimum.bytes_per_token(equal_capacities(model, reader.header))
                    self.measured.cells.append(cell)
                    if link.bytes_per_s is None:
                        self._measure_disk(reader)

    def _links(self) -> list[Link]:
        compute = self.measured.compute
        assert compute is not None
        given = [Link(name, None if name == DISK else parse_link(name)) for name in self._comparison.links]
        return given + [Link(f"ρ {rho:g}", compute.bytes_per_s(rho)) for rho in self._comparison.rhos]

    def _measure_disk(self, reader: StoreReader) -> None:
        self.measured.disk_bytes_per_s = max(self.measured.disk_bytes_per_s, disk_bytes_per_s(reader))

    def _measure_compute(self, model: FateModel, header: StoreHeader) -> Minimum:
        """All experts in memory, or as many as fit: the machine's own speed, and what the requests are routed to."""
        self._step("compute with the experts in memory")
        work = self._workload
        with model.fate.record_routing() as recorder:
            for request in (*work.recorded, *work.measured):
                feed(model, request.ids, request.prompt_tokens)
        passes = [self._feed_measured(model) for _ in range(self._comparison.repeats)]
        self.measured.num_experts = header.num_records
        self.measured.compute = compute_limit(passes, len(header.layers), header.max_record_bytes)
        requests = split_requests(recorder.trace())
        recorded, measured = requests[: len(work.recorded)], requests[len(work.recorded) :]
        settling = [recorded[at] for at in work.settling(self._comparison.settle_tokens)]
        sizes = [header.layout(layer).record_bytes for layer in range(len(header.layers))]
        return Minimum(recorder.trace(), [*recorded, *settling], measured, sizes)

    def _measure_cell(self, model: FateModel, link: Link, experts: str) -> Cell:
        comparison = self._comparison
        cell = Cell(link, experts, {name: [] for name in comparison.systems})
        with_timelines = comparison.timelines and experts == comparison.middle_experts
        for repeat in range(comparison.repeats):
            for system in comparison.systems:
                self._step(f"{link.name}, {experts}: {system}, {repeat + 1} of {comparison.repeats}")
                self._warm_up(model, cell, system)
                cell.runs[system].append(self._measure(model))
                if with_timelines and repeat == comparison.repeats - 1:
                    request = self._workload.measured[0]
                    cell.timelines[system] = trace_last_token(model, request.ids, request.prompt_tokens)
        if self._quality is not None:
            for system in comparison.lossy:
                self._step(f"{link.name}, {experts}: perplexity of {system}")
                self._warm_up(model, cell, system)
                cell.perplexity[system] = self._quality.measure(model)
        return cell

    def _warm_up(self, model: FateModel, cell: Cell, system: str) -> None:
        """A new engine, used to requests like those to come. Where the link is emulated they run unpaced, but for a
        system that switches itself off: it would decide by the wrong pace."""
        pace, work = cell.link.bytes_per_s, self._workload
        model.fate.reconfigure(system=system, experts=cell.experts, link=pace)
        unpaced = pace is not None and not resolve_system(system).switches_off
        if unpaced:
            model.fate.set_link(None)
        settling = [work.recorded[at] for at in work.settling(self._comparison.settle_tokens)]
        for request in (*work.recorded, *settling):
            feed(model, request.ids, request.prompt_tokens)
        if unpaced:
            model.fate.set_link(pace)

    def _measure(self, model: FateModel) -> Run:
        before = model.fate.layer_stats()
        passes = self._feed_measured(model)
        layers = [after - start for after, start in zip(model.fate.layer_stats(), before, strict=True)]
        return make_run(passes, layers, model.fate.plan.num_slots, model.fate.notes)

    def _feed_measured(self, model: FateModel) -> list[Pass]:
        return [feed(model, request.ids, request.prompt_tokens) for request in self._workload.measured]

    def _step(self, what: str) -> None:
        self._progress(self._steps_done, self._num_steps(), what)
        self._steps_done += 1

    def _num_steps(self) -> int:
        comparison = self._comparison
        runs = comparison.repeats * len(comparison.systems)
        if self._quality is None:
            return 1 + comparison.num_cells * runs
        return 2 + comparison.num_cells * (runs + len(comparison.lossy))
