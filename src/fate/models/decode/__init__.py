"""Native decoding: which modules of a model go by two native calls a layer, built once at load.

>>> native = NativeModel(model, layers, step)
>>> native.refresh()            # builds the calls from weights and settings as they are now
>>> native.changed()            # somebody has set something: refresh again
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fate.kernels import decode, native
from fate.models.adapter import MoELayer
from fate.models.decode import delta
from fate.models.decode.block import NativeBlock, SparseBlock, adopt_blocks, block_spec
from fate.models.decode.layer import NativeDecoderLayer, NativeLayer, adopt_layers, mixer_half
from fate.models.decode.modules import adopt
from fate.models.decode.watch import Watch, hears_everything


class NativeModel:
    """The native calls of one model. step: the forward under way in this thread, whose `native` says whether they may
    be made now. top_k: experts of a token."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoELayer], top_k: int, step: Any) -> None:
        self._watch = Watch()
        self._step = step
        self._buffers: decode.Buffers | None = None
        self._modules: list[nn.Module] = []
        self._rules: list[nn.Module] = []
        self._experts: list[nn.Module] = []
        self._configs: list[tuple[Any, Any]] = []
        if native.extension() is None:
            return
        adopt(model, self._watch)
        adopt_blocks(model, self._watch)
        delta.adopt(model, self._watch)
        adopt_layers(model, self._watch)
        self._rules = [m for m in model.modules() if isinstance(m, delta.NativeDeltaRule)]
        self._modules = [m for m in model.modules() if isinstance(m, (NativeDecoderLayer, SparseBlock))]
        self._experts = [layer.experts for layer in layers]
        experts = max(layer.num_experts for layer in layers)
        hidden = layers[0].matrices[0].cols if layers[0].matrices else 0
        if model.dtype in native.DTYPE_CODES and hidden:
            self._buffers = decode.Buffers(decode.MAX_ROWS, hidden, top_k, experts, model.dtype)

    @property
    def buffers(self) -> decode.Buffers | None:
        return self._buffers

    def changed(self) -> bool:
        """Whether something that native calls were built from has changed since `refresh`."""
        return self._watch.changed() or any(_implementations(config) != held for config, held in self._configs)

    @property
    def allowed(self) -> bool:
        """Whether native calls may be made at all now: nobody hears of every module, and no autocast is on."""
        return self._buffers is not None and not hears_everything() and not torch.is_autocast_enabled("cpu")

    @property
    def kind(self) -> str:
        """What of a decoded token's layer is native: "layer" (two calls), "block" (attention is the family's own),
        "experts" (the block, too, is the family's own) or "" (nothing)."""
        built = [module.__dict__.get("fate_native") for module in self._modules]
        if any(isinstance(native, NativeLayer) for native in built):
            return "layer"
        if any(isinstance(native, NativeBlock) for native in built):
            return "block"
        return "experts" if any(e.__dict__["fate_layer"].is_native for e in self._experts) else ""

    def refresh(self) -> None:
        """Build the native calls from the modules' weights and settings as they are now."""
        for module in (*self._modules, *self._rules):
            module.__dict__["fate_native"] = None
        if self._buffers is not None:
            for rule in self._rules:
                rule.__dict__["fate_native"] = delta.build(rule, self._buffers.dtype)
            for experts in self._experts:
                experts.__dict__["fate_layer"].build(None, self._buffers)
            for module in self._modules:
                module.__dict__["fate_native"] = self._built(module)
        parts = [part for module in (*self._modules, *self._rules) for part in module.modules()]
        configs = {id(c): c for part in parts if (c := part.__dict__.get("config")) is not None}
        self._configs = [(config, _implementations(config)) for config in configs.values()]
        self._watch.restart(_tensors(parts), parts)

    def _built(self, module: Any) -> NativeLayer | NativeBlock | None:
        assert self._buffers is not None
        dtype = self._buffers.normed.dtype
        if isinstance(module, SparseBlock):
            layer, spec = _expert_layer(module), block_spec(module, dtype)
            if layer is None or spec is None or not layer.build(spec.shared, self._buffers):
                return None
            return NativeBlock(module, spec, layer, self._buffers, self._step)
        sparse = isinstance(module.mlp, SparseBlock)
        layer, spec = (_expert_layer(module.mlp), block_spec(module.mlp, dtype)) if sparse else (None, None)
        if layer is None or spec is None or spec.router is None or not layer.build(spec.shared, self._buffers):
            spec = None  # the MLP is called as a module
        half = mixer_half(module, spec, dtype)
        return None if half is None else NativeLayer(module, half, layer, self._buffers, self._step)


def _expert_layer(block: Any) -> Any:
    return block._modules["experts"].__dict__.get("fate_layer")


def _implementations(config: Any) -> tuple[Any, Any]:
    held = object.__getattribute__(config, "__dict__")
    return held.get("_attn_implementation_internal"), held.get("_experts_implementation_internal")


def _tensors(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    seen: set[int] = set()
    for module in modules:
        for tensor in module._parameters.values():
            if tensor is not None and not tensor.is_meta and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
