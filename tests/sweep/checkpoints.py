"""Tiny random checkpoints of any family as hub repositories have them: each expert's matrices apart."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fate.models.auto import auto_class
from fate.synth import byte_tokenizer


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
