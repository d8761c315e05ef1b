"""Putting an engine together: plan first (nothing allocated), then, once dense weights are in, slots and threads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from fate.cache import ALLOCATIONS, POLICIES, ExpertCache
from fate.memory import (
    MemoryPlan,
    available_bytes,
    check_available,
    default_budget,
    make_plan,
    parse_experts,
    parse_memory,
)
from fate.models.adapter import MoELayer
from fate.models.routers import RouterGate
from fate.precision import PRECISIONS
from fate.predict import PREDICTORS, PredictorContext
from fate.runtime import planning
from fate.runtime.backend import LayerRuntime
from fate.runtime.manager import ExpertManager
from fate.runtime.session import Session, attach
from fate.runtime.slots import SlotPool
from fate.store.reader import StoreReader
from fate.systems import EXACT, System, resolve_system
from fate.transfer.disk import DiskSource
from fate.transfer.scheduler import Transfer, TransferScheduler

logger = logging.getLogger("fate")


@dataclass(frozen=True)
class LoadOptions:
    """What `fate.load` takes. memory: size, None: what is free less a margin. experts: at most this share ("25%",
    0.25) or number of experts in memory. on_plan: called with (plan, system) before anything is allocated."""

    memory: str | int | None = None
    experts: str | int | float | None = None
    system: str | System = EXACT
    max_context: int | None = None
    max_batch: int = 1
    prefill_chunk: int = planning.DEFAULT_PREFILL_CHUNK
    logit_rows: int | None = None
    on_plan: Callable[[MemoryPlan, System], None] | None = None


class Assembly:
    """A planned engine. `start` allocates the slots, opens the threads and attaches `model.fate`."""

    def __init__(self, layers: list[MoELayer], reader: StoreReader, system: System, plan: MemoryPlan, transient: int):
        self._layers = layers
        self._reader = reader
        self._system = system
        self._plan = plan
        self._transient = transient

    def start(self, model: PreTrainedModel) -> None:
        header = self._reader.header
        counts = [layer.num_experts for layer in header.layers]
        shares = ALLOCATIONS.get(self._system.allocation)
        capacities = shares(counts, self._plan.num_slots - self._transient, planning.LAYER_FLOOR)
        cache: ExpertCache[Transfer] = ExpertCache(capacities, self._transient, POLICIES.get(self._system.policy))
        pool = SlotPool(cache.num_slots, header.max_record_bytes)
        guesses = self._transient * header.max_record_bytes  # what the transient region holds
        scheduler = TransferScheduler(DiskSource(self._reader, pool.view), prefetch_cap_bytes=guesses)
        manager = ExpertManager(header, cache, scheduler, PRECISIONS.get(self._system.precision)())
        gates = [RouterGate(layer.router, layer.num_experts) if layer.router else None for layer in self._layers]
        predictor = PREDICTORS.get(self._system.predictor)(PredictorContext(gates, manager.incomplete))
        for layer, gate in zip(self._layers, gates, strict=True):
            runtime = LayerRuntime(layer, manager, pool, predictor, gate)
            layer.experts.__dict__["fate_layer"] = runtime
            if layer.router is not None:
                layer.router.register_forward_hook(runtime.on_router, with_kwargs=True)
        attach(model, Session(self._system, self._plan, manager, pool))


def assemble(model: PreTrainedModel, layers: list[MoELayer], reader: StoreReader, options: LoadOptions) -> Assembly:
    """Resolve the options against `model` (on the meta device); raises BudgetTooSmallError and other usage errors."""
    system = resolve_system(options.system)
    envelope = planning.resolve_envelope(
        model, options.max_context, options.max_batch, options.prefill_chunk, options.logit_rows
    )
    needs = planning.measure_needs(model, reader.header, planning.dense_bytes(reader.path), envelope)
    budget = default_budget() if options.memory is None else parse_memory(options.memory)
    transient = planning.transient_slots(model, reader.header)
    experts = parse_experts(options.experts, needs.total_experts)
    plan = make_plan(budget, envelope, needs, max_experts=experts)
    if options.on_plan is not None:
        options.on_plan(plan, system)
    check_available(plan, available_bytes())
    _warn_if_hopeless(model, plan, len(layers), transient)
    return Assembly(layers, reader, system, plan, transient)


def _warn_if_hopeless(model: PreTrainedModel, plan: MemoryPlan, num_layers: int, transient: int) -> None:
    each, needed = (plan.num_slots - transient) / num_layers, planning.top_k(model)
    if each < needed:
        logger.warning(
            "%.1f cached experts a layer for %d used by every token: almost nothing will be found in memory; "
            "a larger budget helps at once",
            each,
            needed,
        )
