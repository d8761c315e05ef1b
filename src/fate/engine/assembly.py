"""Putting an engine together: plan first (nothing allocated), then, once dense weights are in, slots and threads."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from fate.cache import ALLOCATIONS, POLICIES, ExpertCache, SlotRequest
from fate.engine.accounting import Accounting
from fate.engine.engine import Engine
from fate.engine.experts import LayerRuntime
from fate.engine.prefetch import Prefetcher
from fate.engine.residency import Residency
from fate.engine.session import Session, attach
from fate.engine.slots import SlotPool
from fate.engine.step import Steps
from fate.engine.switch import PrefetchSwitch
from fate.errors import ProfileMissingError
from fate.kernels import native
from fate.models import attention
from fate.models.adapter import MoELayer
from fate.models.decode import NativeModel
from fate.models.gate import RouterGate
from fate.plan import needs as planning
from fate.plan.budget import DEFAULT_PREFILL_CHUNK, MemoryPlan, check_available, default_budget, make_plan
from fate.plan.machine import available_bytes
from fate.plan.profile import Profile, read_profile
from fate.precision import PRECISIONS
from fate.predict import PREDICTORS, PredictorContext
from fate.store.ahead import DenseWeights
from fate.store.reader import StoreReader
from fate.systems import EXACT, System, resolve_system
from fate.transfer.disk import DiskSource
from fate.transfer.link import Link
from fate.transfer.memory import MemoryRecords, PacedMemorySource
from fate.transfer.scheduler import Source, Transfer, TransferScheduler
from fate.units import parse_experts, parse_link, parse_memory

logger = logging.getLogger("fate")
PREFETCHED_TOKENS = 4  # prefetches that may be staged, in units of top-k
PREFETCH_SHARE = 12  # and at most one slot in so many


@dataclass(frozen=True)
class LoadOptions:
    """What `fate.load` takes. memory: size, None: what is free less a margin. experts: at most this share ("25%",
    0.25) or number of experts in memory. link: serve the records from a copy in memory at this speed ("12GB/s", bytes
    per second) instead of from the disk. on_plan: called with (plan, system) before slots are allocated. dense: what
    is read ahead of the store's dense weights."""

    memory: str | int | None = None
    experts: str | int | float | None = None
    system: str | System = EXACT
    max_context: int | None = None
    max_batch: int = 1
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK
    logit_rows: int | None = None
    link: str | float | None = None
    on_plan: Callable[[MemoryPlan, System], None] | None = None
    dense: DenseWeights | None = None


class Assembly:
    """A planned model. `start` attaches `model.fate`; `build` makes an engine, now and whenever one is exchanged."""

    def __init__(self, layers: list[MoELayer], reader: StoreReader, transient: int, top_k: int) -> None:
        self.reader = reader
        self.link = Link()
        self.profile: Profile | None = None
        self._records: MemoryRecords | None = None  # once a link has been emulated
        self._transient = transient
        self.top_k = top_k
        self._counts = [layer.num_experts for layer in reader.header.layers]
        self._layers = layers
        self._gates = [_gate(layer) for layer in layers]
        self._runtimes: list[LayerRuntime] = []
        self.steps = Steps()
        self.native: NativeModel | None = None
        self.copied_configs: list[attention.Copied] = []

    def start(self, model: PreTrainedModel, system: System, plan: MemoryPlan, link: float | None) -> None:
        """Hook the layers, allocate the slots, open the threads. A system that needs a profile of this machine and
        store waits for one (`loading.ensure_profile`); until then experts are loaded on demand."""
        if system.needs_profile:
            self.profile = read_profile(self.reader.path, self.reader.header).profile
            system = system if self.profile is not None else resolve_system("load-on-demand")
        for layer, gate in zip(self._layers, self._gates, strict=True):
            runtime = LayerRuntime(layer, gate, self.steps.current)
            for experts in (layer.experts, *layer.aliases):
                experts.__dict__["fate_layer"] = runtime
            if layer.router is not None and gate is not None:
                layer.router.register_forward_hook(runtime.on_router, with_kwargs=True)
            self._runtimes.append(runtime)
        self.copied_configs = attention.adopt(model)
        self.native = NativeModel(model, self._layers, self.top_k, self.steps.current)
        attach(model, Session(self, self.build(system, plan, link), link))

    def build(self, system: System, plan: MemoryPlan, link: float | None) -> Engine:
        """A new engine with an empty cache, which the model's layers use from now on. link: see `LoadOptions`."""
        if system.needs_profile and self.profile is None:
            raise ProfileMissingError(system.name)
        header = self.reader.header
        capacities, transient = self._divide(system, plan.num_slots, link)
        accounting = Accounting(len(self._counts))
        cache: ExpertCache[Transfer] = ExpertCache(
            self._counts, capacities, transient, POLICIES.get(system.policy), shared=system.allocation == "global"
        )
        pool = SlotPool(cache.num_slots, header.max_record_bytes)
        scheduler = TransferScheduler(
            self._source(pool, link),
            prefetch_cap_bytes=transient * header.max_record_bytes,
            meter=accounting.count_read,
            listener=accounting.tell_read,
        )
        timing = self.profile.timing(link) if self.profile is not None else None
        precision = PRECISIONS.get(system.precision)(timing)
        residency = Residency(header, cache, scheduler, precision, accounting, self.steps.lock)
        notes: list[str] = []
        switch = PrefetchSwitch(lambda note: _announce(notes, note), trial=system.prefetches and system.switches_off)
        prefetch = Prefetcher(residency, switch)
        predictor = PREDICTORS.get(system.predictor)(
            PredictorContext(
                self._gates,
                residency.incomplete,
                self._counts,
                self.top_k,
                cache.cached,
                link_load=lambda: prefetch.link_load,
            )
        )
        if system.prefetches:
            prefetch.use(predictor)
        engine = Engine(system, plan, residency, pool, predictor, prefetch, switch, accounting, notes)
        for runtime in self._runtimes:
            runtime.bind(engine)
        if self.native is not None:
            self.native.refresh()
        return engine

    def _divide(self, system: System, num_slots: int, link: float | None) -> tuple[list[int], int]:
        """Cached experts of each layer, and transient slots. These are the least there may be, and more for prefetching
        where slots are plenty but do not hold all experts. All are transient where nothing is cached."""
        if not system.cached:
            return [0] * len(self._counts), num_slots
        transient = self._transient
        if system.prefetches and num_slots - transient < sum(self._counts):
            transient = max(transient, min(PREFETCHED_TOKENS * self.top_k, num_slots // PREFETCH_SHARE))
        costs = self.profile.costs(link) if self.profile is not None else None
        request = SlotRequest(self._counts, num_slots - transient, planning.LAYER_FLOOR, self.top_k, costs)
        capacities = ALLOCATIONS.get(system.allocation)(request)
        return capacities, num_slots - sum(capacities)

    def _source(self, pool: SlotPool, link: float | None) -> Source:
        self.link.bytes_per_s = link
        if link is None:
            return DiskSource(self.reader, pool.view)
        if self._records is None:
            self._records = MemoryRecords(self.reader)
        return PacedMemorySource(self._records, pool.view, self.link)


def _gate(layer: MoELayer) -> RouterGate | None:
    if layer.router is None:
        return None
    return RouterGate(layer.router, layer.num_experts, getattr(layer.experts, "read_router", None))


def _announce(notes: list[str], note: str) -> None:
    notes.append(note)
    logging.getLogger("fate.engine").warning("%s", note)


def assemble(
    model: PreTrainedModel, layers: list[MoELayer], reader: StoreReader, options: LoadOptions, dense_resident: int
) -> Callable[[PreTrainedModel], None]:
    """Resolve the options against `model` (on the meta device); the result starts its engine once dense weights are in.

    dense_resident: bytes of them that are in already, so that the plan does not count them twice.
    Raises BudgetTooSmallError and other usage errors.
    """
    link = parse_link(options.link) if options.link is not None else None
    system = resolve_system(options.system)
    envelope = planning.resolve_envelope(
        model, options.max_context, options.max_batch, options.prefill_chunk, options.logit_rows
    )
    needs = planning.measure_needs(model, reader.header, planning.dense_bytes(reader.path), envelope)
    needs = replace(needs, runtime=needs.runtime - dense_resident)
    if link is not None:
        needs = replace(needs, records=reader.header.file_bytes)
    budget = default_budget() if options.memory is None else parse_memory(options.memory)
    transient = planning.transient_slots(model, reader.header)
    experts = parse_experts(options.experts, needs.total_experts)
    plan = make_plan(budget, envelope, needs, max_experts=experts)
    if native.missing():
        logger.warning("%s", native.missing())
    if options.on_plan is not None:
        options.on_plan(plan, system)
    check_available(plan, available_bytes())
    _warn_if_hopeless(model, plan, len(layers), transient)
    assembly = Assembly(layers, reader, transient, planning.top_k(model))
    return functools.partial(assembly.start, system=system, plan=plan, link=link)


def _warn_if_hopeless(model: PreTrainedModel, plan: MemoryPlan, num_layers: int, transient: int) -> None:
    each, needed = (plan.num_slots - transient) / num_layers, planning.top_k(model)
    if each < needed:
        logger.warning(
            "%.1f cached experts a layer for %d used by every token: almost nothing will be found in memory; "
            "a larger budget helps at once",
            each,
            needed,
        )
