"""Systems x budgets x links on given prompts: the comparison a claim of speed is made from.

In one cell (a link, a budget) the systems alternate, A B A B, so that whatever drifts drifts for all. Each measurement
is an engine of its own on the same dense weights. It runs the recorded requests (enough steps for an engine to decide
whether prefetching pays; without a cache, one request is enough), and then the measured ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fate.bench.comparison import DISK, Comparison, Link, Workload, rho_name, system_called
from fate.bench.limits import Compute, compute_limit, disk_bytes_per_s
from fate.bench.minimum import Minimum, equal_capacities, split_requests
from fate.bench.passes import Pass, feed, trace_last_token
from fate.bench.prompts import Request
from fate.bench.quality import Quality
from fate.bench.summary import Run, make_run
from fate.engine.session import FateModel
from fate.load import ensure_profile, load
from fate.predict.oracle import Oracle
from fate.store.format import StoreHeader
from fate.store.reader import StoreReader
from fate.systems import System
from fate.trace import TraceStep
from fate.units import parse_link

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
    perplexity: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Measured:
    """Everything so far; only finished cells are in it. fingerprint: the store's. disk_bytes_per_s: the best seen."""

    num_experts: int = 0
    fingerprint: str = ""
    compute: Compute | None = None
    disk_bytes_per_s: float = 0.0
    cells: list[Cell] = field(default_factory=list)


@dataclass(frozen=True)
class _Known:
    """A request, and what it is routed to."""

    request: Request
    steps: list[TraceStep]


class SystemsBench:
    """`run` fills `measured`, which stands whatever interrupts it. `measured` may be given with cells in it: they are
    not run again, and the speed of links goes by its compute."""

    def __init__(
        self,
        comparison: Comparison,
        workload: Workload,
        quality: Quality | None = None,
        measured: Measured | None = None,
    ) -> None:
        self.measured = measured or Measured()
        self._comparison = comparison
        self._workload = workload
        self._quality = quality
        self._same_everywhere: dict[str, dict[str, Any]] = {}  # perplexity of systems that no budget or link changes
        self._warm_up_requests: list[_Known] = []
        self._measured_requests: list[_Known] = []
        self._progress: Progress = lambda *_: None
        self._steps_done = 0
        done = {(cell.link.name, cell.experts) for cell in self.measured.cells}
        self._left = [cell for cell in comparison.cells if cell not in done]

    @property
    def complete(self) -> bool:
        return len(self.measured.cells) == len(self._comparison.cells)

    def run(self, store: Path, progress: Progress, on_cell: Callable[[], None] = lambda: None) -> None:
        """progress: called with (steps done, steps in all, what comes next). on_cell: after each finished cell. Raises
        what loading raises, and LinkMemoryError where the records of an emulated link do not fit."""
        if self.complete:
            return
        self._progress = progress
        progress(0, self._num_steps(), "loading")
        context = self._workload.context
        with load(store, system=_WITHOUT_GUESSES, max_context=context, on_plan=lambda *_: None) as model:
            reader = model.fate.reader
            header = reader.header
            self.measured.num_experts, self.measured.fingerprint = header.num_records, header.fingerprint
            if any(system_called(name).needs_profile for name in self._comparison.systems):
                ensure_profile(model)
            self._measure_disk(reader)
            self._step("compute with the experts in memory")
            minimum = self._record(model, header)
            self._measure_compute(model, header)
            if self._quality is not None:
                self._step("perplexity of an exact system")
                self._quality.measure_exact(model)
            links = {link.name: link for link in self._links()}
            order = self._comparison.cells
            for name, experts in self._left:
                cell = self.measure_cell(model, links[name], experts)
                cell.minimum = minimum.bytes_per_token(equal_capacities(model, header))
                self.measured.cells.append(cell)
                self.measured.cells.sort(key=lambda cell: order.index((cell.link.name, cell.experts)))
                if cell.link.bytes_per_s is None:
                    self._measure_disk(reader)
                on_cell()

    def _links(self) -> list[Link]:
        compute = self.measured.compute
        assert compute is not None
        given = [Link(name, None if name == DISK else parse_link(name)) for name in self._comparison.links]
        return given + [Link(rho_name(rho), compute.bytes_per_s(rho)) for rho in self._comparison.rhos]

    def _measure_disk(self, reader: StoreReader) -> None:
        self.measured.disk_bytes_per_s = max(self.measured.disk_bytes_per_s, disk_bytes_per_s(reader))

    def _record(self, model: FateModel, header: StoreHeader) -> Minimum:
        """What all requests are routed to."""
        warm_up = self._workload.warm_up(self._comparison.settle_tokens)
        requests = [*warm_up, *self._workload.measured]
        with model.fate.record_routing() as recorder:
            for request in requests:
                feed(model, request.ids, request.prompt_tokens)
        steps = split_requests(recorder.trace())
        known = [_Known(request, found) for request, found in zip(requests, steps, strict=True)]
        self._warm_up_requests, self._measured_requests = known[: len(warm_up)], known[len(warm_up) :]
        sizes = [header.layout(layer).record_bytes for layer in range(len(header.layers))]
        return Minimum(recorder.trace(), steps[: len(warm_up)], steps[len(warm_up) :], sizes)

    def _measure_compute(self, model: FateModel, header: StoreHeader) -> None:
        """All experts in memory, or as many as fit: the machine's own speed."""
        if self.measured.compute is None:
            passes = [self._feed_measured(model) for _ in range(self._comparison.repeats)]
            self.measured.compute = compute_limit(passes, len(header.layers), header.max_record_bytes)

    def measure_cell(self, model: FateModel, link: Link, experts: str) -> Cell:
        comparison = self._comparison
        cell = Cell(link, experts, {name: [] for name in comparison.systems})
        with_timelines = comparison.timelines and experts == comparison.middle_experts
        for repeat in range(comparison.repeats):
            for name in comparison.systems:
                self._step(f"{link.name}, {experts}: {name}, {repeat + 1} of {comparison.repeats}")
                self._warm_up(model, cell, system_called(name))
                cell.runs[name].append(self.measure(model))
                if repeat < comparison.repeats - 1:
                    continue
                if with_timelines:
                    cell.timelines[name] = self._trace_last_token(model)
                if self._quality is not None and name in comparison.lossy:
                    cell.perplexity[name] = self._measure_quality(model, self._quality)
        return cell

    def _warm_up(self, model: FateModel, cell: Cell, system: System) -> None:
        """A new engine, used to requests like those to come. Where the link is emulated they run unpaced, but for a
        system that switches itself off: it would decide by the wrong pace."""
        pace = cell.link.bytes_per_s
        model.fate.reconfigure(system=system, experts=cell.experts, link=pace)
        model.fate.engine.pool.populate()
        unpaced = pace is not None and not system.switches_off
        if unpaced:
            model.fate.set_link(None)
        requests = self._warm_up_requests
        for known in requests if system.cached else requests[:1]:
            self._feed(model, known)
        if unpaced:
            model.fate.set_link(pace)

    def measure(self, model: FateModel) -> Run:
        before = model.fate.layer_stats()
        passes = self._feed_measured(model)
        layers = [after - start for after, start in zip(model.fate.layer_stats(), before, strict=True)]
        return make_run(passes, layers, model.fate.plan.num_slots, model.fate.notes)

    def _measure_quality(self, model: FateModel, quality: Quality) -> dict[str, Any]:
        """In the engine that was just measured, at its pace, on which it depends what is in memory and stays whole."""
        system = model.fate.system
        self._progress(self._steps_done, self._num_steps(), f"perplexity of {system.name}")
        if system.needs_profile:
            return quality.measure(model)
        if system.name not in self._same_everywhere:
            self._same_everywhere[system.name] = quality.measure(model)
        return self._same_everywhere[system.name]

    def _feed_measured(self, model: FateModel) -> list[Pass]:
        return [self._feed(model, known) for known in self._measured_requests]

    def _feed(self, model: FateModel, known: _Known) -> Pass:
        _foretell(model, known)
        return feed(model, known.request.ids, known.request.prompt_tokens)

    def _trace_last_token(self, model: FateModel) -> dict[str, Any]:
        known = self._measured_requests[0]
        _foretell(model, known)
        return trace_last_token(model, known.request.ids, known.request.prompt_tokens)

    def _step(self, what: str) -> None:
        self._progress(self._steps_done, self._num_steps(), what)
        self._steps_done += 1

    def _num_steps(self) -> int:
        comparison = self._comparison
        return 1 + (self._quality is not None) + len(self._left) * comparison.repeats * len(comparison.systems)


def _foretell(model: FateModel, known: _Known) -> None:
    """An oracle is told what the request will be routed to."""
    predictor = model.fate.engine.predictor
    if isinstance(predictor, Oracle):
        predictor.foretell(known.steps)
