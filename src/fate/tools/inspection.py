"""What a model is made of and the least memory it runs in, from its config and headers; no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from fate.convert.quantized import open_checkpoint
from fate.convert.source import read_config
from fate.core import Envelope
from fate.engine.experts import EXPERTS_FUNCTION
from fate.models.adapter import MoELayer, build_meta_model, find_moe_layers
from fate.models.config import transformers_config
from fate.models.packable import packable
from fate.plan import needs as planning
from fate.plan.budget import DEFAULT_PREFILL_CHUNK, Needs
from fate.store.format import LayerSpec, MatrixSpec, RecordLayout, StoreHeader
from fate.store.reader import StoreReader, is_store


@dataclass(frozen=True)
class Inspection:
    """A model's geometry and memory needs. codec, dense_bytes: of the store, or what `fate convert` would write."""

    path: Path
    is_store: bool
    model_type: str
    codec: str
    layers: list[MoELayer]
    header: StoreHeader
    top_k: int
    dense_bytes: int
    needs: Needs
    envelope: Envelope

    def expert_bytes(self, codec: str) -> int:
        """All experts' records in `codec`; "int2" is what an INT2 pass reads."""
        total = 0
        for layer in self.header.layers:
            layout = RecordLayout("int4" if codec == "int2" else codec, layer.matrices)
            total += layer.num_experts * (layout.split if codec == "int2" else layout.record_bytes)
        return total

    @property
    def expert_weights(self) -> int:
        return sum(layer.num_experts * sum(m.weights for m in layer.matrices) for layer in self.header.layers)


def inspect_model(
    path: Path, max_context: int | None = None, dense_bits: int = 8, trust_remote_code: bool = False
) -> Inspection:
    """Raises the same errors loading would: NotMoEError, UnsupportedModelError, CheckpointError, StoreError."""
    stored = is_store(path)
    if stored:
        reader = StoreReader(path)  # first: a damaged store is named as one
        reader.close()
        header, dense = reader.header, planning.dense_bytes(path)
        config = transformers_config(path, trust_remote_code)
        del config.quantization_config
    else:
        with open_checkpoint(path) as checkpoint:
            config = read_config(checkpoint, trust_remote_code)
    model = meta_model(config, trust_remote_code)
    layers = find_moe_layers(model)
    if not stored:
        specs = tuple(LayerSpec(layer.name, layer.num_experts, layer.matrices) for layer in layers)
        header = StoreHeader("int4", "", config.model_type, specs)
        dense = packed_dense_bytes(model, layers, dense_bits)
    envelope = planning.resolve_envelope(model, max_context, 1, DEFAULT_PREFILL_CHUNK, None)
    needs = planning.measure_needs(model, header, dense, envelope)
    top_k = planning.top_k(model)
    return Inspection(
        path,
        stored,
        config.model_type,
        ", ".join(dict.fromkeys(header.codecs)),
        layers,
        header,
        top_k,
        dense,
        needs,
        envelope,
    )


def meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device with our experts function, which only passes shapes there."""
    config._experts_implementation = EXPERTS_FUNCTION
    return build_meta_model(config, trust_remote_code)


def packed_dense_bytes(model: PreTrainedModel, layers: list[MoELayer], dense_bits: int) -> int:
    packed = packable(model, layers) if dense_bits < 16 else {}
    experts = {f"{layer.name}.{m.name}" for layer in layers for m in layer.matrices}
    total = 0
    for name, parameter in model.named_parameters():
        if name in experts or name in model.all_tied_weights_keys:
            continue
        if name.removesuffix(".weight") in packed:
            spec = MatrixSpec("weight", *parameter.shape)
            total += RecordLayout(f"int{dense_bits}", (spec,), page_aligned=False).record_bytes
        else:
            total += parameter.numel() * parameter.element_size()
    return total
