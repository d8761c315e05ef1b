"""Reading Hugging Face checkpoints: a directory of safetensors, one tensor or a few rows at a time.

Tensors are read with `preadv` into fresh memory and the pages dropped from the page cache, so neither resident memory
nor a memory cgroup grows with the file. What tensors mean is not known here; `convert.mapping` maps them to parameters.

>>> checkpoint = Checkpoint(resolve_source("Qwen/Qwen1.5-MoE-A2.7B"))
>>> checkpoint.read("model.embed_tokens.weight").dtype
torch.bfloat16
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fate.errors import CheckpointError, ModelNotFoundError
from fate.fileio import drop_cache
from fate.models.config import read_checkpoint_config
from fate.store.dtypes import DTYPES
from fate.store.tensorheader import TensorHeader, TensorHeaderError, read_tensor_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_DOWNLOAD = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*"]
_HUB_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"
_DO_NOT_DOWNLOAD = ["consolidated*", "original/*", "onnx/*", "metal/*"]


@dataclass(frozen=True)
class _Location:
    """Where one tensor's bytes lie: `offset` is absolute in `shard`."""

    shard: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The tensors of a local checkpoint directory (`model.safetensors`, or an index and its shards).

    Raises ModelNotFoundError where there is no `config.json` or no safetensors, CheckpointError for damage.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_checkpoint_config(self.path)
        self._headers: dict[Path, bytes] = {}
        self._tensors: dict[str, _Location] = {}
        self._files: dict[Path, int] = {}
        indexed = self._shards()
        for shard in sorted(set(indexed.values()) or {self._single_file}):
            header = _read_header(self.path / shard)
            self._headers[self.path / shard] = header.text
            self._tensors.update(_locate(self.path / shard, header))
        absent = [key for key in indexed if key not in self._tensors]
        if absent:
            raise CheckpointError(
                f"{self.path}/{indexed[absent[0]]} lacks {absent[0]} which the index names ({len(absent)} such "
                "tensors): download the checkpoint again"
            )

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def nbytes(self, key: str) -> int:
        return self._tensors[key].nbytes

    def meta(self, key: str) -> torch.Tensor:
        """An empty tensor on the meta device with the tensor's shape and dtype."""
        return torch.empty(self.shape(key), dtype=self.dtype(key), device="meta")

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        return self._read(self._tensors[key], 0, self.nbytes(key)).reshape(self.shape(key))

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start:stop` of the first dimension."""
        location = self._tensors[key]
        row_bytes = location.nbytes // location.shape[0]
        data = self._read(location, start * row_bytes, (stop - start) * row_bytes)
        return data.reshape(stop - start, *location.shape[1:])

    def fingerprint(self) -> str:
        """Hex digest that tells checkpoints apart: config; each shard's name, size, time of change, header and samples.

        The data is too large to be read whole; a shard rewritten in place is told by its time of change.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for shard, header in self._headers.items():
            status = shard.stat()
            size = status.st_size
            digest.update(f"{shard.name}:{size}:{status.st_mtime_ns}:".encode() + header)
            for sample in range(_SAMPLES):
                offset = (size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1)
                digest.update(os.pread(self._file(shard), _SAMPLE_BYTES, max(offset, 0)))
        return digest.hexdigest()

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def _single_file(self) -> str:
        """The file that holds everything, or that the config names instead (which may be an index)."""
        return str(self.config.get("transformers_weights") or SINGLE_FILE)

    def _shards(self) -> dict[str, str]:
        """Tensor -> shard file as the index has it; empty for a single-file checkpoint."""
        named_index = self._single_file.endswith(".index.json")
        if not named_index and (self.path / self._single_file).is_file():
            return {}
        index = self.path / (self._single_file if named_index else INDEX_FILE)
        if not index.is_file():
            other = "only *.bin weights" if list(self.path.glob("*.bin")) else "no weights"
            raise ModelNotFoundError(
                f"{self.path} has {other}: fate reads safetensors, so load and save_pretrained it with transformers"
                if "bin" in other
                else f"{self.path} has {other}: neither {SINGLE_FILE} nor {INDEX_FILE} is there, download them"
            )
        try:
            shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
            names = set(shards.values())
            if not names or not all(isinstance(name, str) and name for name in names):
                raise ValueError("its weight_map names no files")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index ({error!r}): download it again") from error
        missing = sorted(name for name in names if not (self.path / name).is_file())
        if missing:
            raise CheckpointError(
                f"{self.path} lacks {missing[0]} ({len(missing)} of {len(names)} shards missing): "
                "download the checkpoint again"
            )
        return shards

    def _file(self, shard: Path) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]

    def _read(self, location: _Location, start: int, length: int) -> torch.Tensor:
        """1-D tensor of `length` bytes from `start` within the tensor."""
        buffer = torch.empty(length, dtype=torch.uint8)
        view = buffer.numpy().data
        file, offset, done = self._file(location.shard), location.offset + start, 0
        while done < length:
            count = os.preadv(file, [view[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{location.shard} was cut short while it was read: download it again")
            done += count
        drop_cache(file, offset, length)
        return buffer.view(location.dtype)


def resolve_source(model: str | Path) -> Path:
    """The local directory, or GGUF file, of `model`: itself if it is one, else the hub's, downloaded if need be.

    Raises ModelNotFoundError where `model` is neither, or the hub cannot be reached or refuses.
    """
    name, path = str(model), Path(model).expanduser()
    if name and (path.is_dir() or (path.suffix == ".gguf" and path.is_file())):
        return path
    if path.exists() or not re.fullmatch(_HUB_ID, name):
        raise ModelNotFoundError(
            f"{name!r} is not a directory: give a checkpoint directory or a hub id such as org/name"
        )
    return _downloaded(name, _DOWNLOAD)


def resolve_outline(model: str | Path) -> Path:
    """A directory with `model`'s configuration and index: itself, or of the hub's only these, without any weight."""
    path = Path(model).expanduser()
    if path.is_file():
        raise ModelNotFoundError(f"{model} is a file: give the directory of a checkpoint or store, or a hub id")
    if path.is_dir() or not re.fullmatch(_HUB_ID, str(model)):
        return resolve_source(model)
    return _downloaded(str(model), ["config.json", INDEX_FILE, "*.py"])


def _downloaded(name: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=_DO_NOT_DOWNLOAD))
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{name!r} is gated: accept its terms on the hub and log in with hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"{name!r} is neither a directory nor a model on the hub: check the name") from error
    except Exception as error:  # the hub client raises its transport's own exceptions, which vary with its version
        raise ModelNotFoundError(
            f"{name!r} is not a directory and could not be downloaded ({type(error).__name__}): check the name and the "
            "network, or give a local directory"
        ) from error


def _read_header(shard: Path) -> TensorHeader:
    try:
        return read_tensor_header(shard)
    except TensorHeaderError as error:
        raise CheckpointError(f"{shard} {error}: download it again") from error


def _locate(shard: Path, header: TensorHeader) -> dict[str, _Location]:
    """Where each tensor's bytes lie; raises CheckpointError for sizes that cannot be and a file cut short."""
    located = {}
    for tensor in header.tensors:
        dtype = DTYPES.get(tensor.dtype)
        location = _Location(shard, header.data_start + tensor.start, dtype or torch.uint8, tensor.shape)
        if dtype is None or tensor.end - tensor.start != location.nbytes:
            problem = f"{tensor.name}: {tensor.dtype} {list(tensor.shape)} in bytes {tensor.start}:{tensor.end}"
            raise CheckpointError(f"{shard} has a corrupt header ({problem}): download it again")
        located[tensor.name] = location
    size, end = shard.stat().st_size, header.data_start + header.data_bytes
    if end > size:
        raise CheckpointError(f"{shard} is cut short: it has {size} bytes of {end}, download it again")
    return located
