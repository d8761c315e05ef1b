"""What a checkpoint brings besides tensors: its configuration, tokenizer and licence files."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from fate.convert.checkpoint import Checkpoint
from fate.convert.quantized.gguf import gguf_config, gguf_tokenizer_files, is_gguf
from fate.models.config import transformers_config

_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "additional_chat_templates/*.jinja")


def read_config(checkpoint: Checkpoint, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The checkpoint's config with its dtype settled as `from_pretrained` does: the config's, else the weights'."""
    path = checkpoint.path
    config = gguf_config(path) if is_gguf(path) else transformers_config(path, trust_remote_code)
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)  # its weights come dequantized
    text = config.get_text_config()
    dtype = text.dtype or config.dtype or _first_float_dtype(checkpoint)
    config.dtype = text.dtype = dtype
    return config


def copied_files(path: Path, code: bool = False) -> dict[str, bytes]:
    """The tokenizer's, generation's and licence files of a checkpoint, and its code: relative name -> content."""
    if is_gguf(path):
        return gguf_tokenizer_files(path)
    files = {file for pattern in (*_COPIED, *(["*.py"] if code else [])) for file in path.glob(pattern)}
    names = sorted(file.relative_to(path).as_posix() for file in files if file.is_file())
    return {name: (path / name).read_bytes() for name in names if not name.endswith(".index.json")}


def _first_float_dtype(checkpoint: Checkpoint) -> torch.dtype:
    dtypes = (checkpoint.dtype(key) for key in sorted(checkpoint.keys()))
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
