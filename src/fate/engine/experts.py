"""The experts of one layer: routing, lease, compute, sum. One road for every token, resident or streamed.

transformers calls `experts(hidden_states, top_k_index, top_k_weights)`, which is `LayerRuntime.forward`. Blocks that
are ours route natively and call `LayerRuntime.run_routed`. Both go by `_run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fate.core import Routing
from fate.engine.batch import Batch, ExpertBatch, ExpertCode, RoutedBatch
from fate.engine.step import CurrentStep
from fate.kernels import decode
from fate.kernels.native import DTYPE_CODES
from fate.models.activation import recognise
from fate.models.adapter import MoELayer
from fate.models.gate import RouterGate
from fate.trace.observer import LayerEvent

if TYPE_CHECKING:
    from fate.engine.engine import Engine

EXPERTS_FUNCTION = "fate"


class LayerRuntime:
    """Computes one MoE layer from the slots of an engine (`bind`). `gate` remembers what the layer's router sees."""

    def __init__(self, layer: MoELayer, gate: RouterGate | None, step: CurrentStep) -> None:
        self.index = layer.index
        self.num_experts = layer.num_experts
        self.lock = step.lock
        self._experts: Any = layer.experts
        self._activation = recognise(layer.experts)
        self._gate = gate
        self._step = step
        self._gate_input: Tensor | None = None
        self._half: decode.ExpertHalf | None = None  # with the block's shared expert, where it is ours
        self._plain_half: decode.ExpertHalf | None = None  # experts alone
        self._buffers: decode.Buffers | None = None

    def bind(self, engine: Engine) -> None:
        """Compute with this engine from now on; `build` comes after it."""
        self._engine = engine
        self._code = ExpertCode(self._experts, engine.residency.header.layout(self.index), self._activation)
        self._half = self._plain_half = self._buffers = self._gate_input = None

    @property
    def is_native(self) -> bool:
        """Whether few rows of its experts are computed by one native call."""
        return self._plain_half is not None

    def build(self, shared: decode.SharedExpert | None, buffers: decode.Buffers) -> bool:
        """Build the native call of experts and sum; False where these experts are computed otherwise."""
        if not self._code.is_native or self._code.layout.matrices[0].cols != buffers.normed.shape[1]:
            return False
        self._buffers = buffers
        self._plain_half = self._make_half(None, buffers)
        self._half = self._plain_half if shared is None else self._make_half(shared, buffers)
        return True

    def _make_half(self, shared: decode.SharedExpert | None, buffers: decode.Buffers) -> decode.ExpertHalf:
        assert self._activation is not None
        return decode.ExpertHalf(
            layout=self._code.layout,
            activation=self._activation,
            biases=self._code.biases,
            shared=shared,
            pool=self._engine.pool.tensor,
            slot_bytes=self._engine.pool.slot_bytes,
            hidden=buffers.hidden,
            dtype=buffers.dtype,
        )

    def on_router(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the layer's router."""
        if self._gate is not None:
            self._gate_input = self._gate.record(args, kwargs)

    on_router.is_ours = True  # type: ignore[attr-defined]  # native calls may pass it over

    def run_routed(self, routed: decode.Routed, x: Tensor, *, add_residual: bool) -> Tensor:
        """The block's output, of x's shape, for rows that were routed natively, its shared expert included; plus what
        attention left in the buffers, if `add_residual`."""
        assert self._half is not None
        assert self._buffers is not None
        gate_input = self._buffers.normed_of(x.shape[0])
        if self._gate is not None and not self._gate.was_called:
            self._gate.record((gate_input,), {})
        batch = RoutedBatch(self._half, routed, self._buffers, torch.empty_like(x), add_residual)
        return self._run(batch, gate_input)

    def forward(
        self,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        meanwhile: Callable[[], Any] | None = None,
    ) -> Tensor:
        """x [tokens, hidden], indices and weights [tokens, rank] -> the experts' sum [tokens, hidden]. meanwhile:
        called once the reads of missing experts are queued."""
        gate_input, self._gate_input = self._gate_input, None
        x = x.contiguous()
        with self.lock:
            return self._run(self._batch(x, top_k_index, top_k_weights), gate_input, meanwhile)

    def _batch(self, x: Tensor, index: Tensor, weights: Tensor) -> Batch:
        buffers = self._buffers
        if (
            self._plain_half is not None
            and buffers is not None
            and x.shape[0] <= decode.MAX_ROWS
            and x.dtype is buffers.normed.dtype
            and index.shape[1] <= buffers.top_k
            and weights.dtype in DTYPE_CODES
        ):
            routed = decode.group(buffers, x, index, weights, self.num_experts)
            return RoutedBatch(self._plain_half, routed, buffers, torch.empty_like(x), add_residual=False)
        return ExpertBatch(self._code, self._engine.pool, x, index, weights, self.num_experts)

    def _run(self, batch: Batch, gate_input: Tensor | None, meanwhile: Callable[[], Any] | None = None) -> Tensor:
        """The one road: lease, prefetch, compute what is there, then what arrives, and sum."""
        engine, clock = self._engine, time.perf_counter
        start = clock()
        engine.stop_if_asked()
        routing = self._routing(batch)
        computes = []
        with self.lock, engine.residency.begin(routing) as lease:
            predict = engine.prefetch.after_routing(routing, gate_input)
            if meanwhile is not None:
                meanwhile()
            first = True
            for group in lease:
                began = clock()
                batch.compute(group, first=first, last=lease.complete)
                computes.append((began, clock()))
                first = False
            engine.prefetch.pump()
            out = batch.result()
            stats = lease.stats
            stats.expert_compute_s += sum(end - began for began, end in computes)
            if predict is not None:
                stats.predict_s += predict[1] - predict[0]
            end = clock()
            stats.total_s += end - start
            if engine.accounting.observers:
                event = LayerEvent(routing, start, end, tuple(computes), tuple(lease.stalls), predict, stats)
                engine.accounting.tell(event)
        return out

    def _routing(self, batch: Batch) -> Routing:
        step = self._step
        return Routing(self.index, batch.pairs_per_expert, batch.rows, step.prefill, batch.gate_weights, step.spans)


def experts_forward(
    module: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The "fate" experts function; `module.fate_layer` is set when the model is loaded."""
    if hidden_states.is_meta:  # shapes only: measuring what a forward needs
        return torch.empty_like(hidden_states)
    layer: LayerRuntime = module.__dict__["fate_layer"]
    return layer.forward(hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, experts_forward)
