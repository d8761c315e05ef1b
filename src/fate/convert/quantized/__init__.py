"""Checkpoints whose weights are quantized already, read as if they were not: a scheme's packed tensors appear under
their weight's name, and are dequantized as they are read.

>>> checkpoint = open_checkpoint(Path("DeepSeek-V3"))  # FP8 with a scale for every block of 128 by 128
>>> checkpoint.read("model.layers.3.mlp.experts.0.down_proj.weight").dtype
torch.bfloat16
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fate.convert.checkpoint import Checkpoint
from fate.convert.quantized import awq, fp8, gptq, mxfp4
from fate.convert.quantized.gguf import GgufCheckpoint, is_gguf
from fate.convert.quantized.virtual import Virtual
from fate.errors import UnsupportedModelError
from fate.models.config import read_checkpoint_config

Scheme = Callable[[Checkpoint, dict[str, Any]], dict[str, Virtual]]

# quant_method -> what finds its weights; each also says which tensors they are made of.
SCHEMES: dict[str, Scheme] = {"fp8": fp8.find, "mxfp4": mxfp4.find, "gptq": gptq.find, "awq": awq.find}


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, a directory or a GGUF file, dequantizing where its config says that it is quantized.

    Raises UnsupportedModelError for a method or a layout that is not known, and what `Checkpoint` raises.
    """
    if is_gguf(path):
        return GgufCheckpoint(path)
    settings = quantization_of(read_checkpoint_config(path))
    if settings is None:
        return Checkpoint(path)
    method = str(settings.get("quant_method", "unknown"))
    if method not in SCHEMES:
        fix = "it is a store already" if method == "fate" else "convert the unquantized checkpoint it was made from"
        raise UnsupportedModelError(
            f"{path} is quantized (quant_method {method!r}): known are {', '.join(sorted(SCHEMES))}; {fix}"
        )
    return QuantizedCheckpoint(path, SCHEMES[method], settings)


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """`quantization_config` of a config.json, of the whole model or its text model."""
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    return found if isinstance(found, dict) else None


class QuantizedCheckpoint(Checkpoint):
    """A checkpoint in which a scheme's weights stand in place of the tensors they are packed in."""

    def __init__(self, path: str | Path, scheme: Scheme, settings: dict[str, Any]) -> None:
        super().__init__(path)
        self._packed = Checkpoint(path)
        self._virtual = scheme(self._packed, settings)
        parts = {part for weight in self._virtual.values() for part in weight.parts}
        held = super().keys()
        self._plain = [key for key in held if key not in parts and key not in self._virtual]
        self.config = _unquantized(self.config)

    def keys(self) -> list[str]:
        return [*self._plain, *self._virtual]

    def shape(self, key: str) -> tuple[int, ...]:
        return self._virtual[key].shape if key in self._virtual else super().shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._virtual[key].dtype if key in self._virtual else super().dtype(key)

    def nbytes(self, key: str) -> int:
        return math.prod(self.shape(key)) * self.dtype(key).itemsize

    def read(self, key: str) -> torch.Tensor:
        return self.read_rows(key, 0, self.shape(key)[0]) if key in self._virtual else super().read(key)

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        if key not in self._virtual:
            return super().read_rows(key, start, stop)
        weight = self._virtual[key]
        return weight.read_rows(start, stop).to(weight.dtype)

    def close(self) -> None:
        self._packed.close()
        super().close()


def _unquantized(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(text := kept.get("text_config"), dict):
        kept["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return kept
