"""The experts function registered with transformers as "fate", and what stands behind it for each layer.

transformers calls `experts(hidden_states, top_k_index, top_k_weights)`; we turn routing into a lease, compute groups of
experts as they land, and sum their rows in rank order, so that arrival never changes a bit of the result.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fate import kernels
from fate.core import Precision, Routing
from fate.engine.lease import Lease
from fate.engine.manager import ExpertManager, Slot
from fate.engine.payoff import Payoff
from fate.engine.slots import SlotPool
from fate.engine.switch import PrefetchSwitch
from fate.kernels.block import BlockRun, PooledExperts
from fate.models.activation import recognise
from fate.models.adapter import MoELayer
from fate.models.routers import RouterGate
from fate.predict import Predictor

EXPERTS_FUNCTION = "fate"
Ran = TypeVar("Ran")


class LayerRuntime:
    """Computes one MoE layer from the slots of an engine (`bind`). `gate` remembers what the layer's router sees."""

    function = EXPERTS_FUNCTION

    def __init__(self, layer: MoELayer, gate: RouterGate | None) -> None:
        self.index = layer.index
        self._experts: Any = layer.experts
        self._first = "gate_up_proj" if self._experts.has_gate else "up_proj"
        self._num_experts = layer.num_experts
        self._gate = gate
        self._activation = recognise(layer.experts)
        self.hooks: list[Any] = [self.on_router]  # ours, on router and block
        self._compute = self._generic if self._activation is None else self._fused
        self._gate_input: torch.Tensor | None = None
        self._early: dict[int, int] | None = None  # what the router said when it was asked early

    def bind(self, manager: ExpertManager, pool: SlotPool, predictor: Predictor, switch: PrefetchSwitch) -> None:
        """Compute with this engine from now on."""
        self.manager = manager
        self._pool = pool
        self._predictor = predictor
        self._switch = switch
        self._layout = manager.header.layout(self.index)
        module, packed = self._experts, not self._layout.is_raw
        self._joins = packed and self._activation is not None and not (module.has_bias or module.has_post_expert_norm)
        activation, slots = self._activation or kernels.SWIGLU, manager.cache.whole_slots(self.index)
        self.pooled = PooledExperts(self._layout, activation, pool.tensor, pool.slot_bytes, slots)
        self._gate_input = self._early = None
        self.measure_again()

    def measure_again(self) -> None:
        """What was measured was at another pace."""
        self._payoffs = {prefill: Payoff() for prefill in (False, True)}

    def on_router(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the layer's router."""
        if self._gate is not None:
            self._gate_input = self._gate.record(args, kwargs)

    @property
    def asks_early(self) -> bool:
        """Whether asking the router early may pay; like guessing, it is given up where measurement shows a loss."""
        manager = self.manager
        return self._switch.on and manager.incomplete(self.index) and self._payoffs[manager.prefill].pays

    def begin_early(self, gate_input: torch.Tensor, pairs: dict[int, int], start: float) -> None:
        """The router's word (pairs of each expert) before the model itself asks for it: demand what is missing now
        (see `early.py`). start: when it was asked (`time.perf_counter`)."""
        manager = self.manager
        self._early = None
        with manager.lock:
            if not manager.sound:
                return
            with manager.between_leases():
                routing = self._routing(pairs, gate_input.shape[0])
                manager.demand_early(routing)
                self._payoffs[manager.prefill].asked(time.perf_counter() - start)
                self._predict(routing, gate_input)
            self._early = pairs

    def forward(self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden], indices and weights [tokens, rank] -> [tokens, hidden]."""
        start = time.perf_counter()
        x = x.contiguous()
        work = (_OneToken if x.shape[0] == 1 else _Work)(x, top_k_index, top_k_weights, self._num_experts)
        manager = self.manager
        stats, payoff = manager.stats[self.index], self._payoffs[manager.prefill]
        stall_s = stats.stall_s
        with manager.lock, self._lease(work) as lease:
            for group in lease:
                began = time.perf_counter()
                self._compute(group, work)
                self._note(began, "compute", "expert_compute_s")
        payoff.waited(stats.stall_s - stall_s)
        out = kernels.reduce_rows(work.rows, work.weights, x.dtype)
        self._note(start, "layer", "total_s")
        if manager.recorder is not None:
            manager.recorder.record(lease.routing)
        return out

    @property
    def quiet(self) -> bool:
        """Whether a block may be computed whole: it is of a known kind, no predictor wants to be asked first, and the
        next lease would go on with the experts there are."""
        manager = self.manager
        return self._joins and manager.ready and (not self._switch.on or manager.all_cached)

    def compute_whole(self, compute: Callable[[PooledExperts], Ran], *, rehearsal: bool = False) -> Ran | None:
        """`compute` the whole block of one token from the experts in memory, and account for its BlockRun (unless it is
        a rehearsal); it may give anything else where one is not in memory. None, and nothing is done, where that takes
        the modules themselves, such as where a predictor is to be asked."""
        manager = self.manager
        with manager.lock:
            if not self.quiet:
                return None
            start = time.perf_counter()
            run = compute(self.pooled)
            if isinstance(run, BlockRun) and not rehearsal:
                self._early = self._gate_input = None
                manager.later(functools.partial(self._account, run, start))
        return run

    def _account(self, run: BlockRun, start: float) -> None:
        """Of a block that was computed whole, from `start` on."""
        manager = self.manager
        routing = self._routing(dict.fromkeys(run.experts, 1), 1)
        if self._gate is not None:
            self._gate.record((run.x.view(1, -1),), {})
        manager.use_whole(routing)
        self._payoffs[manager.prefill].waited(0.0)
        self._note(start + run.routed_s, "compute", "expert_compute_s", start + run.computed_s)
        self._note(start + run.routed_s, "layer", "total_s", start + run.summed_s)
        if manager.recorder is not None:
            manager.recorder.record(routing)

    def _lease(self, work: _Work) -> Lease:
        """Demand what is missing and guess what comes after, unless that was done early, on the same word."""
        early, self._early = self._early, None
        gate_input, self._gate_input = self._gate_input, None
        early = early if self.manager.sound else None
        lease = self.manager.begin(self._routing(work.pairs_per_expert, work.x.shape[0]))
        if early != work.pairs_per_expert:
            self._predict(lease.routing, gate_input)
        return lease

    def _routing(self, pairs: dict[int, int], tokens: int) -> Routing:
        return Routing(self.index, pairs, tokens, self.manager.prefill)

    def _predict(self, routing: Routing, gate_input: torch.Tensor | None) -> None:
        """After this layer's demands are queued, before its experts compute."""
        if not self._switch.on or self.manager.all_cached:
            return
        start = time.perf_counter()
        self.manager.guess(self._predictor.predict(routing, gate_input), routing.tokens)
        self._note(start, "predict", "predict_s")

    def _note(self, start: float, kind: str, counter: str, end: float | None = None) -> None:
        end = time.perf_counter() if end is None else end
        stats = self.manager.stats[self.index]
        setattr(stats, counter, getattr(stats, counter) + end - start)
        if self.manager.timeline is not None:
            self.manager.timeline.add(start, end, kind, self.index)

    def _fused(self, group: list[Slot], work: _Work) -> None:
        """Both matrices, their biases and the activation between them in the kernel."""
        assert self._activation is not None
        offsets = [self._pool.offset(entry.slot) for entry in group]
        precisions = [_held(entry) for entry in group]
        numbers = [entry.key.expert for entry in group]
        bounds, pairs = work.pairs(numbers)
        kernels.experts(
            work.x,
            self._pool.tensor,
            self._layout,
            offsets,
            precisions,
            bounds,
            pairs,
            work.rows,
            self._activation,
            self._biases(numbers),
        )
        if self._experts.has_post_expert_norm:
            for first, end in pairwise(bounds):  # one by one: the same bits whatever has arrived together
                self._normalize(work, *pairs[first:end].long().unbind(1))

    def _biases(self, numbers: list[int]) -> kernels.ExpertBiases | None:
        module = self._experts
        if not module.has_bias:
            return None
        return kernels.ExpertBiases(getattr(module, f"{self._first}_bias"), module.down_proj_bias, numbers)

    def _normalize(self, work: _Work, tokens: torch.Tensor, ranks: torch.Tensor) -> None:
        out = work.rows[tokens, ranks].to(work.x.dtype)
        work.rows[tokens, ranks] = self._experts.post_expert_norm(out).float()

    def _generic(self, group: list[Slot], work: _Work) -> None:
        """An activation that no kernel knows: packed linears around the module's own."""
        module = self._experts
        for entry in group:
            expert = entry.key.expert
            _bounds, pairs = work.pairs([expert])
            tokens, ranks = pairs[:, 0].long(), pairs[:, 1].long()
            record = self._pool.tensor[self._pool.offset(entry.slot) :][: self._layout.record_bytes]
            hidden = self._linear(work.x[tokens], record, 0, _held(entry), self._first, expert)
            hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
            out = self._linear(hidden.contiguous(), record, 1, _held(entry), "down_proj", expert)
            work.rows[tokens, ranks] = out.float()
            if module.has_post_expert_norm:
                self._normalize(work, tokens, ranks)

    def _linear(
        self, x: torch.Tensor, record: torch.Tensor, index: int, precision: Precision, name: str, expert: int
    ) -> torch.Tensor:
        out = kernels.linear(x, record, self._layout, index, precision)
        return out + getattr(self._experts, f"{name}_bias")[expert] if self._experts.has_bias else out


def _held(entry: Slot) -> Precision:
    assert entry.precision is not None, "a lease yields experts that have landed"
    return entry.precision


class _Work:
    """One call's routing, grouped by expert. Pairs with weight zero, and the sentinel index, are dropped.

    rows: float32 [tokens, rank, hidden], written once per surviving pair.
    """

    def __init__(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, num_experts: int) -> None:
        tokens, ranks = index.shape
        self.x = x
        self.rows = torch.empty(tokens, ranks, x.shape[-1], dtype=torch.float32)
        dropped = (weights == 0) | (index >= num_experts)
        self.weights = weights.masked_fill(dropped, 0)
        experts = index.masked_fill(dropped, num_experts).reshape(-1)
        ordered, order = experts.sort(stable=True)  # by expert, then token, then rank
        counts = torch.bincount(ordered, minlength=num_experts + 1)[:num_experts]
        ends = counts.cumsum(0)
        self._pairs = torch.stack([order // ranks, order % ranks], dim=1).to(torch.int32)
        by_popularity = counts.argsort(descending=True, stable=True).tolist()
        counted, end_of = counts.tolist(), ends.tolist()
        self.pairs_per_expert = {e: counted[e] for e in by_popularity if counted[e]}
        self._span = {e: (end_of[e] - counted[e], end_of[e]) for e in self.pairs_per_expert}

    def pairs(self, experts: list[int]) -> tuple[list[int], torch.Tensor]:
        """(bounds [experts + 1], int32 [pairs, 2] of (token, rank)) of the given experts, in their order."""
        bounds = [0]
        pieces = []
        for expert in experts:
            start, end = self._span[expert]
            pieces.append(self._pairs[start:end])
            bounds.append(bounds[-1] + end - start)
        return bounds, pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)


class _OneToken(_Work):
    """The same for the one token of a decoding step, without a dozen torch operations on four numbers."""

    def __init__(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, num_experts: int) -> None:
        self.x = x
        self.rows = torch.empty(*index.shape, x.shape[-1], dtype=torch.float32)
        experts, given = index[0].tolist(), weights[0].tolist()
        self._ranks: dict[int, list[int]] = {}
        for rank, (expert, weight) in enumerate(zip(experts, given, strict=True)):
            if weight and expert < num_experts:
                self._ranks.setdefault(expert, []).append(rank)
        self.weights = (
            weights
            if all(expert < num_experts for expert in experts)
            else (weights.masked_fill(index >= num_experts, 0))
        )
        ordered = sorted(self._ranks, key=lambda expert: (-len(self._ranks[expert]), expert))
        self.pairs_per_expert = {expert: len(self._ranks[expert]) for expert in ordered}

    def pairs(self, experts: list[int]) -> tuple[list[int], torch.Tensor]:
        bounds, ranks = [0], []
        for expert in experts:
            ranks += self._ranks[expert]
            bounds.append(len(ranks))
        return bounds, _one_tokens_pairs(tuple(ranks))


@functools.lru_cache(maxsize=1024)
def _one_tokens_pairs(ranks: tuple[int, ...]) -> torch.Tensor:
    """int32 [ranks, 2] of (0, rank), to be read only: a tensor of eight numbers takes longer to make than to find."""
    return torch.tensor([(0, rank) for rank in ranks], dtype=torch.int32, device="cpu")


def pairs_per_expert(index: torch.Tensor, weights: torch.Tensor, num_experts: int) -> dict[int, int]:
    """Of indices and weights [tokens, rank]: pairs of each expert, the most popular first, as `Routing` wants them."""
    return _Work(weights[:, :0], index, weights, num_experts).pairs_per_expert


def experts_forward(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The "fate" experts function; `module.fate_layer` is set when the model is loaded."""
    if hidden_states.is_meta:  # shapes only: measuring what a forward needs
        return torch.empty_like(hidden_states)
    layer: LayerRuntime = module.__dict__["fate_layer"]
    return layer.forward(hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, experts_forward)
