"""Tiny random checkpoints of any family as hub repositories have them: each expert's matrices apart."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fate.core import ExpertKey
from fate.kernels.reference import dequantize
from fate.models.adapter import find_moe_layers
from fate.models.auto import auto_class
from fate.store.reader import StoreReader
from fate.tools.synth.store import byte_tokenizer


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of the family's own initialisation, in which nothing that is learned is left at zero or one."""
    torch.manual_seed(seed)
    model: PreTrainedModel = auto_class(config).from_config(config, dtype="float32").eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                tensor += torch.randn_like(tensor) * 0.05
    return model


def save_checkpoint(config: PreTrainedConfig, folder: Path) -> Path:
    """Save `random_model` and a byte tokenizer in `folder`."""
    random_model(config).save_pretrained(folder, max_shard_size="1MB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def dequantize_experts(model: PreTrainedModel, store: Path) -> None:
    """Give `model`, transformers' own, the experts of `store` as its records say they are."""
    reader = StoreReader(store)
    for layer in find_moe_layers(model):
        layout = reader.header.layout(layer.index)
        for expert in range(layer.num_experts):
            buffer = mmap.mmap(-1, layout.record_bytes)
            reader.read_into(ExpertKey(layer.index, expert), memoryview(buffer), 0)
            record = torch.frombuffer(buffer, dtype=torch.uint8)
            for index, matrix in enumerate(layer.matrices):
                value = dequantize(record, layout, index)
                stacked = layer.experts.get_parameter(matrix.name)
                stacked.data[expert] = value.T if layer.experts.is_transposed else value
    reader.close()
