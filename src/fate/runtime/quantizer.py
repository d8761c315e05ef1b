"""transformers' side of loading a store: `quant_method: "fate"`.

transformers builds the model on the meta device, calls us before and after it loads `dense.safetensors`; in between
the experts have no weights and the packed modules none that transformers knows of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fate.errors import StoreMismatchError
from fate.models.adapter import MoELayer, find_moe_layers
from fate.models.adapters import adapt
from fate.models.packed import PackedEmbedding, PackedLinear
from fate.runtime.assembly import LoadOptions, assemble
from fate.runtime.backend import EXPERTS_FUNCTION
from fate.store.reader import DENSE_FILE, StoreReader, iter_packed

METHOD = "fate"


@register_quantization_config(METHOD)
class FateConfig(QuantizationConfigMixin):
    """The `quantization_config` of a store's config.json, and (never saved) the options of this load."""

    def __init__(self, load_options: LoadOptions | None = None, **stored: Any) -> None:
        self.quant_method: Any = METHOD
        self.stored = {key: value for key, value in stored.items() if key != "quant_method"}
        self.load_options = load_options or LoadOptions()

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, **self.stored}


@register_quantizer(METHOD)
class FateQuantizer(HfQuantizer):
    quantization_config: FateConfig

    def __init__(self, quantization_config: FateConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._reader: StoreReader | None = None
        self._layers: list[MoELayer] = []
        self._packed: dict[str, PackedLinear | PackedEmbedding] = {}

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The one hook that sees the config before files are resolved: name ours, and our experts function."""
        config.transformers_weights = DENSE_FILE
        config._experts_implementation = EXPERTS_FUNCTION
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        assert checkpoint_files is not None
        self._reader = StoreReader(Path(checkpoint_files[0]).parent)
        adapt(model)
        self._layers = find_moe_layers(model)
        _check_geometry(self._layers, self._reader)
        self._start = assemble(model, self._layers, self._reader, self.quantization_config.load_options)
        for layer in self._layers:
            for experts in (layer.experts, *layer.aliases):
                for matrix in layer.matrices:  # they stay unallocated
                    experts._parameters[matrix.name] = None
                experts.__dict__["_is_hf_initialized"] = True
            layer.block.__dict__["_is_hf_initialized"] = True  # some blocks initialise their experts' weights
        self._replace_packed(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        assert self._reader is not None
        tied = self.quantization_config.stored.get("tied", {})
        waiting = dict(self._packed)
        for name, packed in iter_packed(self._reader.path):
            module_name = name.removesuffix(".weight")
            for target in (module_name, *(t for t, source in tied.items() if source == module_name)):
                if (module := waiting.pop(target, None)) is not None:
                    module.packed = packed
        if waiting:
            raise StoreMismatchError(f"{self._reader.path} lacks the packed weights of {', '.join(sorted(waiting))}")
        model.requires_grad_(False)  # the KV cache would keep every token's graph
        self._start(model)
        return model

    def _replace_packed(self, model: PreTrainedModel) -> None:
        stored = self.quantization_config.stored
        tied: dict[str, str] = stored.get("tied", {})
        packed: dict[str, dict[str, Any]] = stored.get("packed", {})
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

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _check_geometry(layers: list[MoELayer], reader: StoreReader) -> None:
    """The store's experts are this model's: same modules, counts and shapes."""
    ours = [(layer.name, layer.num_experts, layer.matrices) for layer in layers]
    stored = [(layer.module, layer.num_experts, layer.matrices) for layer in reader.header.layers]
    if ours != stored:
        raise StoreMismatchError(
            f"{reader.file} does not hold the experts that {reader.path / 'config.json'} describes: "
            "convert the checkpoint again"
        )
