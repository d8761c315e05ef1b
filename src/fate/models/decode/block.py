"""Sparse blocks that are ours: the router first, so that reads of missing experts begin while the shared expert
computes; then the experts, as they arrive, and the sum.

Few rows go by two native calls. Everything else, prompts among it, goes module by module, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fate.kernels import decode
from fate.models.decode.modules import (
    GATED,
    NativeLinear,
    NativeMLP,
    NativeRouter,
    is_gated_silu,
    is_plain,
    packed_matrix,
    router_of,
)
from fate.models.decode.watch import Watch, Watched, become, is_unhooked, own_class, records_outputs
from fate.models.forms import BLOCKS, digest


class ExpertLayer(Protocol):
    """What computes the experts of a layer: `engine.experts.LayerRuntime`. lock: held around both native calls."""

    lock: Any

    def run_routed(self, routed: decode.Routed, x: Tensor, *, add_residual: bool) -> Tensor:
        """The block's output, of x's shape, for what `Buffers` holds after routing."""

    def forward(
        self, x: Tensor, indices: Tensor, weights: Tensor, meanwhile: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """The experts' sum [tokens, hidden]; `meanwhile` is called once the reads of missing experts are queued."""


class BlockSpec:
    """A block's parts as native calls take them. router: None where a family's own routes."""

    def __init__(self, router: decode.Router | None, shared: decode.SharedExpert | None) -> None:
        self.router = router
        self.shared = shared


class SparseBlock(Watched):
    """Mixin of a block: `fate_block` holds its spec while two native calls may stand for it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer: ExpertLayer | None = self._modules["experts"].__dict__.get("fate_layer")
        if layer is None or len(args) != 1 or kwargs or not is_plain(args[0]) or args[0].dim() != 3 or self.training:
            return super().forward(*args, **kwargs)
        x: Tensor = args[0]
        flat = x.view(-1, x.shape[-1])
        native: NativeBlock | None = self.__dict__.get("fate_native")
        if native is not None and native.takes(flat):
            return native.run(flat).view(x.shape)
        out = self._by_modules(layer, flat, x)
        return out if isinstance(out, tuple) else out.view(x.shape)

    def _by_modules(self, layer: ExpertLayer, flat: Tensor, x: Tensor) -> Any:
        children: dict[str, Any] = self._modules
        form = BLOCKS[digest(own_class(self).forward)]
        name = form.shared
        _, scores, indices = children[form.router](x if name == "shared_experts" else flat)
        weights, indices = scores.view(-1, scores.shape[-1]), indices.view(-1, indices.shape[-1])
        if not name:
            out: Tensor = children["experts"](flat, indices, weights).view(x.shape)
            return (out, scores) if form.scores else out
        shared: Tensor | None = None

        def compute_shared() -> Tensor:
            nonlocal shared
            shared = children[name](flat)
            return shared

        if is_unhooked(children["experts"]) and not records_outputs() and own_function(children["experts"]):
            out = layer.forward(flat, indices, weights, compute_shared)
        else:
            out = children["experts"](flat, indices, weights)
        if shared is None:
            shared = compute_shared()
        if name == "shared_experts":
            return out + shared
        logits = children["shared_expert_gate"](flat)
        if all(is_plain(t) and t.dtype == flat.dtype for t in (out, shared, logits)):
            return decode.add_gated_logits(out, shared, logits)
        return out + torch.sigmoid(logits) * shared


class NativeBlock:
    """A block of at most MAX_ROWS rows by two native calls: routing, and all the rest. A family's own router stays the
    module it is."""

    def __init__(self, block: nn.Module, spec: BlockSpec, layer: Any, buffers: decode.Buffers, step: Any) -> None:
        form = BLOCKS[digest(own_class(block).forward)]
        self._gate: Any = block._modules[form.router]
        self._gives_scores = form.scores
        self._num_experts: int = layer.num_experts
        self._router = None if spec.router is None else decode.RouterCall(spec.router, buffers.dtype)
        self._held = spec  # keeps the memory alive
        self._layer, self._buffers, self._step = layer, buffers, step

    def takes(self, x: Tensor) -> bool:
        return (
            self._step.native
            and not self._gives_scores
            and x.shape[0] <= decode.MAX_ROWS
            and x.dtype is self._buffers.normed.dtype
            and not records_outputs()
        )

    def run(self, x: Tensor) -> Tensor:
        """x [rows, hidden] -> [rows, hidden]."""
        with self._layer.lock:
            if self._router is not None:
                routed = self._router(self._buffers, x)
            else:
                _, weights, indices = self._gate(x[None])
                routed = decode.group(self._buffers, x, indices, weights, self._num_experts)
            return self._layer.run_routed(routed, x, add_residual=False)


def own_function(experts: nn.Module) -> bool:
    """Whether the configuration still names our function of experts."""
    config = experts.__dict__.get("config")
    held = {} if config is None else object.__getattribute__(config, "__dict__")
    return held.get("_experts_implementation_internal") == "fate"


def adopt_blocks(model: nn.Module, watch: Watch) -> None:
    """Make the sparse blocks of `model` that are of a known form ours."""
    for module in model.modules():
        if isinstance(module, Watched) or digest(type(module).forward) not in BLOCKS:
            continue
        children = {name for name, child in module._modules.items() if child is not None}
        form = BLOCKS[digest(type(module).forward)]
        name = form.shared
        wanted = {form.router, "experts"} | ({name} if name else set())
        if name == "shared_expert":
            wanted.add("shared_expert_gate")
            gate: Any = module._modules["shared_expert_gate"]
            if own_class(gate) is not nn.Linear or gate.bias is not None or gate.out_features != 1:
                continue
        if children != wanted or any(True for _ in (*module._parameters, *module._buffers)):
            continue
        become(module, SparseBlock, watch)
        if name == "shared_expert":
            become(module._modules["shared_expert_gate"], NativeLinear, watch)  # type: ignore[arg-type]
        for child in module.modules():
            if not isinstance(child, Watched):
                become(child, Watched, watch)


def block_spec(block: nn.Module, dtype: torch.dtype) -> BlockSpec | None:
    """The block's router and shared expert as native calls take them; None where somebody hears of its modules, or it
    has a shared expert of another kind."""
    if not isinstance(block, SparseBlock) or block.training:
        return None
    children: dict[str, Any] = block._modules
    form = BLOCKS[digest(own_class(block).forward)]
    name = form.shared
    shared, share = children.get(name) if name else None, children.get("shared_expert_gate")
    parts = [block, children[form.router], children["experts"], *(m for m in (shared, share) if m is not None)]
    if not all(map(is_unhooked, parts)) or not own_function(children["experts"]):
        return None
    gate = children[form.router]
    router = router_of(gate, dtype) if isinstance(gate, NativeRouter) else None
    if shared is None:
        return BlockSpec(router, None)
    weight = None if share is None else share._parameters["weight"]
    if not isinstance(shared, NativeMLP) or not is_gated_silu(shared):
        return None
    if not all(is_unhooked(shared._modules[part]) for part in GATED):  # type: ignore[arg-type]
        return None
    if weight is not None and (weight.dtype != dtype or weight.requires_grad):
        return None
    gate_proj, up_proj, down_proj = (packed_matrix(shared._modules[part]) for part in GATED)  # type: ignore[arg-type]
    return BlockSpec(router, decode.SharedExpert(gate_proj, up_proj, down_proj, weight))
