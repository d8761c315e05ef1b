"""What becomes of a model that transformers loads from a store.

transformers builds it on the meta device, calls us before and after it loads `dense.safetensors`; in between the
experts have no weights and the packed modules none that transformers knows of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fate.engine.assembly import LoadOptions, assemble
from fate.errors import StoreMismatchError
from fate.models.adapter import MoELayer, find_moe_layers
from fate.models.adapters import adapt
from fate.models.packed import PackedEmbedding, PackedLinear
from fate.store.ahead import DenseWeights
from fate.store.reader import StoreReader


class Installation:
    """The expert engine and the packed weights of one model. stored: the `quantization_config` of the store's
    config.json; options: None for a load by transformers alone. Raises what `StoreReader` and `assemble` do."""

    def __init__(
        self, model: PreTrainedModel, store: Path, stored: dict[str, Any], options: LoadOptions | None
    ) -> None:
        options = options or LoadOptions()
        self._stored = stored
        self._packed: dict[str, PackedLinear | PackedEmbedding] = {}
        self._reader = StoreReader(store)
        self._dense = options.dense or DenseWeights(store)
        adapt(model)
        layers = find_moe_layers(model)
        _check_geometry(layers, self._reader)
        self._start = assemble(model, layers, self._reader, options, self._dense.wait())
        for layer in layers:
            for experts in (layer.experts, *layer.aliases):
                for matrix in layer.matrices:  # they stay unallocated
                    experts._parameters[matrix.name] = None
                experts.__dict__["_is_hf_initialized"] = True
            layer.block.__dict__["_is_hf_initialized"] = True  # some blocks initialise their experts' weights
        self._replace_packed(model)

    def finish(self, model: PreTrainedModel) -> None:
        """transformers has loaded the rest: put the packed weights in and start the engine."""
        tied = self._stored.get("tied", {})
        waiting = dict(self._packed)
        with self._dense as dense:
            for name, view in dense.matrices():
                module_name, packed = name.removesuffix(".weight"), torch.frombuffer(view, dtype=torch.uint8)
                for target in (module_name, *(t for t, source in tied.items() if source == module_name)):
                    if (module := waiting.pop(target, None)) is not None:
                        module.packed = packed
        if waiting:
            raise StoreMismatchError(f"{self._reader.path} lacks the packed weights of {', '.join(sorted(waiting))}")
        model.requires_grad_(False)  # the KV cache would keep every token's graph
        self._start(model)

    def _replace_packed(self, model: PreTrainedModel) -> None:
        tied: dict[str, str] = self._stored.get("tied", {})
        packed: dict[str, dict[str, Any]] = self._stored.get("packed", {})
        for name in (*packed, *(target for target, source in tied.items() if source in packed)):
            old: Any = model.get_submodule(name)
            codec = packed[tied.get(name, name)]["codec"]
            kind = PackedEmbedding if isinstance(old, torch.nn.Embedding) else PackedLinear
            new = kind(old, codec, old.weight.dtype)
            new.__dict__["_is_hf_initialized"] = True
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
            self._packed[name] = new
        for key in list(model.all_tied_weights_keys):
            module, _, name = key.rpartition(".")
            if module in self._packed or model.get_submodule(module)._parameters.get(name) is None:
                del model.all_tied_weights_keys[key]


def _check_geometry(layers: list[MoELayer], reader: StoreReader) -> None:
    """The store's experts are this model's: same modules, counts and shapes."""
    ours = [(layer.name, layer.num_experts, layer.matrices) for layer in layers]
    stored = [(layer.module, layer.num_experts, layer.matrices) for layer in reader.header.layers]
    if ours != stored:
        raise StoreMismatchError(
            f"{reader.file} does not hold the experts that {reader.path / 'config.json'} describes: "
            "convert the checkpoint again"
        )
