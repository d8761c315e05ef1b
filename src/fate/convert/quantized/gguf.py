"""GGUF files (llama.cpp's) as checkpoints: their tensors under transformers' parameter names, dequantized as they are
read by the `gguf` package.

Which tensor is which parameter is transformers' own mapping. A layer's experts are stacked already; gate and up, two
tensors in the file, are one parameter here.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fate.convert.checkpoint import Checkpoint
from fate.errors import CheckpointError, UnsupportedModelError
from fate.fileio import drop_cache
from fate.models.adapter import build_meta_model

logger = logging.getLogger("fate")
SUFFIX = ".gguf"
# Families whose tensors transformers reads without changing their values.
ARCHITECTURES = ("qwen2moe", "qwen3moe", "minimax-m2")
_SIZES = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_HASHED_BYTES = 1 << 20


def is_gguf(path: Path) -> bool:
    return path.suffix == SUFFIX and path.is_file()


def gguf_arguments(path: Path) -> tuple[Path, dict[str, str]]:
    """What transformers' `from_pretrained` takes for a checkpoint: (directory, further arguments)."""
    return (path.parent, {"gguf_file": path.name}) if is_gguf(path) else (path, {})


def gguf_config(path: Path) -> Any:
    """The configuration of a GGUF file as transformers reads it, and the sizes that it passes over."""
    from transformers import AutoConfig
    from transformers.integrations.gguf import read_gguf_metadata

    directory, extra = gguf_arguments(path)
    config = AutoConfig.from_pretrained(directory, **extra)
    metadata, _ = read_gguf_metadata(str(path))
    for key, name in _SIZES.items():
        size = metadata.get(f"{metadata['general.architecture']}.{key}")
        if size is not None and hasattr(config, name):
            setattr(config, name, int(size))
    return config


def gguf_tokenizer_files(path: Path) -> dict[str, bytes]:
    """Name -> content of the files of the tokenizer that a GGUF file holds; none where transformers cannot make it."""
    from transformers import AutoTokenizer

    directory, extra = gguf_arguments(path)
    with tempfile.TemporaryDirectory() as folder:
        try:
            AutoTokenizer.from_pretrained(directory, **extra).save_pretrained(folder)
        except Exception as error:  # transformers raises whatever its reader stumbles over
            logger.warning("%s: no tokenizer that transformers can make (%s)", path.name, error)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}


class GgufCheckpoint(Checkpoint):
    """One GGUF file. Raises UnsupportedModelError for a family it does not read or where `gguf` is missing."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise UnsupportedModelError(f"{path} needs the gguf package: pip install fate-moe[gguf]") from error
        self.path = path
        self._gguf: Any = gguf
        try:
            self._reader: Any = gguf.GGUFReader(path)
        except (ValueError, OSError, KeyError, IndexError) as error:
            raise CheckpointError(f"{path} is not a GGUF file ({error}): download it again") from error
        architecture = self._reader.fields["general.architecture"].contents()
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{path} has architecture {architecture!r}: of GGUF files, {', '.join(ARCHITECTURES)} are read; "
                "convert the checkpoint it was made from"
            )
        config = gguf_config(path)
        model, self.config = build_meta_model(config), config.to_dict()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._dtype = self._float_dtype()
        self._parts = self._map(architecture, model)

    def keys(self) -> list[str]:
        return list(self._parts)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        return self._dtype

    def nbytes(self, key: str) -> int:
        return int(np.prod(self._shapes[key])) * self._dtype.itemsize

    def read(self, key: str) -> torch.Tensor:
        return self.read_rows(key, 0, self._shapes[key][0])

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        parts, shape = self._parts[key], self._shapes[key]
        whole = len(parts) == 1 and parts[0].data.shape[0] != shape[0]  # one row, stored as a vector
        pieces = [self._values(part) if whole else self._values(part, start, stop) for part in parts]
        if whole:
            pieces = [pieces[0].reshape(shape)[start:stop]]
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]

    def fingerprint(self) -> str:
        """Hex digest of the file's name, size, time of change and first bytes."""
        status = self.path.stat()
        digest = hashlib.sha256(f"{self.path.name}:{status.st_size}:{status.st_mtime_ns}".encode())
        with self.path.open("rb") as file:
            digest.update(file.read(_HASHED_BYTES))
        return digest.hexdigest()

    def close(self) -> None:
        with self.path.open("rb") as file:
            drop_cache(file.fileno())

    def _values(self, part: Any, start: int = 0, stop: int | None = None) -> torch.Tensor:
        values = self._gguf.dequantize(part.data[start:stop], part.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32)).to(self._dtype)

    def _float_dtype(self) -> torch.dtype:
        """The widest that loses nothing but what quantization has lost: float32 only where all is."""
        kinds = self._gguf.GGMLQuantizationType
        types = {tensor.tensor_type for tensor in self._reader.tensors}
        if types == {kinds.F32}:
            return torch.float32
        return torch.float16 if types <= {kinds.F32, kinds.F16} else torch.bfloat16

    def _map(self, architecture: str, model: Any) -> dict[str, list[Any]]:
        """Parameter -> the file's tensors that it is made of, in order."""
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, get_gguf_hf_weights_map

        names = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS[architecture](config=self.config))
        parts: dict[str, list[Any]] = {}
        for tensor in self._reader.tensors:
            name = names.get(tensor.name, names.get(tensor.name.removesuffix(".weight")))
            if name in self._shapes:
                parts.setdefault(name, []).append(tensor)
        for tensors in parts.values():
            tensors.sort(key=lambda tensor: "ffn_up_exps" in tensor.name)  # gate first
        return parts
