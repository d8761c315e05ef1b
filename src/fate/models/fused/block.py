"""Sparse blocks, without a shared expert or with one that has a gate of its own: the whole block of one token in one
native call where its experts are in memory; otherwise module by module, and what comes after the experts at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fate.kernels.block import BlockRun, Form, PooledExperts, Router, SharedExpert, block_form, sparse_block
from fate.kernels.fused import add_gated
from fate.models.fused.base import (
    Answer,
    Fused,
    may_be_quick,
    own_tensors,
    passable,
    rehearse,
    with_children,
    without_hooks,
)
from fate.models.fused.guard import Guard
from fate.models.fused.linear import FusedLinear, fits
from fate.models.fused.mlp import FusedMLP
from fate.models.fused.router import FusedRouter

_ROUTED: dict[str, type[nn.Module]] = {"gate": FusedRouter, "experts": nn.Module}
_SHARED: dict[str, type[nn.Module]] = {"shared_expert": FusedMLP, "shared_expert_gate": FusedLinear}
_KINDS = {**_ROUTED, **_SHARED}
_IMPLEMENTATION = "_experts_implementation_internal"  # of experts, in a configuration
_TRIALS = ((1.0, 0.0), (1.0, 100.0), (30.0, 0.0))  # scale of the input, what the experts count


Ran = TypeVar("Ran")


class Layer(Protocol):
    """What computes a block's experts: see `engine/backend.py`. function: its name among transformers' functions of
    experts; hooks: its own, on router and block, of which it needs no call where it computes a block whole; pooled: its
    experts; quiet: whether it may compute a block whole now, experts permitting."""

    function: str
    hooks: Collection[Any]
    pooled: PooledExperts

    @property
    def quiet(self) -> bool: ...

    def compute_whole(self, compute: Callable[[PooledExperts], Ran], *, rehearsal: bool = False) -> Ran | None: ...


class FusedBlock(Fused):
    """experts(x, routing), as in Mixtral, OLMoE and Qwen3-MoE; plus sigmoid(shared_expert_gate(x)) * shared_expert(x),
    as in Qwen2-MoE and its heirs."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        children = {name: child for name, child in module._modules.items() if child is not None}
        return (
            "SparseMoeBlock" in type(module).__name__
            and set(children) in (set(_ROUTED), set(_KINDS))
            and not own_tensors(module)
            and all(isinstance(child, _KINDS[name]) for name, child in children.items())
            and getattr(children.get("shared_expert_gate"), "out_features", 1) == 1
        )

    @classmethod
    def take(cls, module: nn.Module) -> None:
        super().take(module)
        module.__dict__["_same_bits"] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not self.training and may_be_quick(args[0]) and self._takes(args[0]):
            x: Tensor = args[0]
            if self.agrees(x.dtype, x):
                return self._joined(x)
        return super().forward(*args, **kwargs)

    def _takes(self, x: Tensor) -> bool:
        if "shared_expert" not in self._modules:
            return x.dim() == 3 and x.shape[:2] == (1, 1)
        gate = self._modules["shared_expert_gate"]
        if not isinstance(gate, FusedLinear) or gate._parameters.get("bias") is not None:
            return False
        weight = gate._parameters.get("weight")
        if weight is None or x.dim() != 3 or weight.shape[0] != 1:
            return False
        return fits(weight, x) and passable((gate,))

    def _joined(self, x: Tensor) -> Tensor:
        """`_quick`, in one call where experts are in memory and nobody wants to hear of the modules passed over. The
        first time both are asked, and must give the same bits."""
        layer, flat = self.layer_behind(), x.view(-1, x.shape[-1])
        if layer is None or (parts := self._for_kernel(layer, flat)) is None:
            return self._quick(x)

        def compute(experts: PooledExperts) -> BlockRun | None:
            return sparse_block(flat, block_form(parts[0], experts, parts[1], x.dtype), experts)

        known: dict[Hashable, bool] = self.__dict__["_same_bits"]
        form = x.dtype, *parts[0][1:]
        if form not in known:
            out = self._quick(x)
            same = rehearse(lambda: self._rehearsal(layer, compute, out))
            if same is not None:
                known[form] = same
            return out
        run = layer.compute_whole(compute) if known[form] else None
        return self._quick(x) if run is None else run.out.view(x.shape)

    @staticmethod
    def _rehearsal(layer: Layer, compute: Callable[[PooledExperts], BlockRun | None], out: Tensor) -> bool | None:
        """Whether one call gives the bits of `out`; None where an expert is not in memory."""
        run = layer.compute_whole(compute, rehearsal=True)
        return None if run is None else torch.equal(run.out.view(out.shape), out)

    def layer_behind(self) -> Layer | None:
        """What computes the experts, where the configuration still says that it does."""
        experts: Any = self._modules["experts"]
        layer: Layer | None = experts.__dict__.get("fate_layer")
        if layer is None or _settings(experts).get(_IMPLEMENTATION) != layer.function:
            return None
        return layer

    def _parts(self) -> tuple[Any, ...]:
        """Router, experts, shared expert and its gate; None for what there is not."""
        return tuple(self._modules.get(name) for name in _KINDS)

    def _for_kernel(self, layer: Layer, x: Tensor) -> tuple[Router, SharedExpert | None] | None:
        """Router and shared expert as the kernel takes them, of one token x [1, hidden]."""
        gate, experts, shared, share = self._parts()
        if not isinstance(gate, FusedRouter) or x.shape[0] != 1:
            return None
        if not passable((experts, shared)) or not passable((gate,), known=layer.hooks):
            return None
        if (router := gate.quick_router(x)) is None:
            return None
        if "shared_expert" not in self._modules:
            return router, None
        matrices = shared.quick_matrices(x) if isinstance(shared, FusedMLP) else None
        return None if matrices is None else (router, SharedExpert(*matrices, share.weight))

    def joined_form(self, layer: Layer, x: Tensor, guard: Guard) -> Form | None:
        """The form of a call on one token x [1, hidden], where calls of its kind are known to give the same bits in
        one; the guard then knows what it depends on."""
        parts = self._for_kernel(layer, x) if self._takes(x[None]) else None
        if parts is None or not self.__dict__["_same_bits"].get((x.dtype, *parts[0][1:])):
            return None
        gate, experts, shared, share = self._parts()
        guard.same(self._modules, *_KINDS)
        guard.same(experts.__dict__, "fate_layer", "config")
        guard.same(_settings(experts), _IMPLEMENTATION)
        if share is not None:
            guard.same_tensor(share._parameters, "weight")
            guard.same(share._parameters, "bias")
        for module in (self, gate, experts, shared, share):
            if module is not None and not guard.unheard(module, known=layer.hooks):
                return None
        if not gate.watch(guard) or not (shared is None or shared.watch(guard)):
            return None
        return block_form(parts[0], layer.pooled, parts[1], x.dtype)

    def _quick(self, x: Tensor) -> Tensor:
        """x [batch, tokens, hidden]; the modules are asked in the order of the class's own forward."""
        children: dict[str, Any] = self._modules
        flat = x.view(-1, x.shape[-1])
        if "shared_expert" not in children:
            _, weights, indices = children["gate"](flat)
            given: Tensor = children["experts"](flat, indices, weights)
            return given.view(x.shape)
        shared = children["shared_expert"](flat)
        _, weights, indices = children["gate"](flat)
        out = children["experts"](flat, indices, weights)
        gate = children["shared_expert_gate"]
        if all(may_be_quick(t) and t.dtype == x.dtype and t.shape == flat.shape for t in (out, shared)):
            return add_gated(out, shared, flat, gate.weight).view(x.shape)
        return (out + torch.sigmoid(gate(flat)) * shared).view(x.shape)  # someone's hooks, or experts of another kind

    def _trial(self, generator: torch.Generator, given: Tensor) -> Iterable[tuple[Answer, Answer]]:
        """With experts that give nothing, or what tells how they were weighted; none of the model's is asked for."""
        quiet = {"gate": without_hooks(self._modules["gate"])}
        shared: Any = self._modules.get("shared_expert")
        if shared is not None:
            inner = {name: without_hooks(child) for name, child in shared._modules.items() if child is not None}
            quiet["shared_expert"] = with_children(without_hooks(shared), **inner)
        for scale, factor in _TRIALS:
            x = (torch.randn(given.shape, generator=generator) * scale).to(given.dtype)
            block = with_children(self, experts=_Experts(factor), **quiet)
            yield (block._quick(x),), (super(FusedBlock, block).forward(x),)


def _settings(experts: Any) -> dict[str, Any]:
    """The configuration's own attributes: one of them takes a dozen calls to read otherwise."""
    held: dict[str, Any] = object.__getattribute__(experts.config, "__dict__")
    return held


class _Experts(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        told = weights * (1 + indices / (indices.max() + 1))  # which weight is whose
        return (x * told.sum(dim=-1, keepdim=True) * self._factor).to(x.dtype)
