"""Checkpoints of full-size models with random weights, as the hub has them: to measure conversion without a download.

Names, shapes and dtypes are those `save_pretrained` would write (experts apart, one tensor each; safetensors shards
with an index), found on the meta device. Values are drawn as `store.py` draws a store's, so that the store converted
from it routes alike. One block of a tensor is in memory at a time.

>>> synth_checkpoint("qwen1.5-moe-a2.7b", Path("qwen"), num_layers=2)
PosixPath('qwen')
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from fate.convert import Progress
from fate.convert.checkpoint import INDEX_FILE
from fate.convert.mapping import parameter_dtypes
from fate.errors import DiskFullError, OutputExistsError, UsageError
from fate.fileio import drop_cache
from fate.models.adapter import build_meta_model
from fate.store.tensorfile import TensorEntry, TensorFileLayout
from fate.tools.synth.routing import ROUTINGS, STD, UniformRouting
from fate.tools.synth.shapes import default_routing
from fate.tools.synth.store import Noise, pair_tokenizer, synth_config
from fate.units import MIB, format_bytes

SHARD_BYTES = 4 * 10**9
_SYNC_BYTES = 64 * MIB


def synth_checkpoint(
    name: str,
    out: Path,
    seed: int = 0,
    num_layers: int | None = None,
    progress: Progress | None = None,
    routing: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a bfloat16 checkpoint of random weights of the shapes of `name` (one of MODELS) at `out`; returns `out`.

    num_layers: the model's own unless given. routing: see `synth`. Memory stays under a
    few hundred MiB; what was written is removed where it cannot be finished.
    Raises UnknownNameError, UsageError, OutputExistsError or DiskFullError.
    """
    config = synth_config(name, num_layers)
    shape = ROUTINGS.get(default_routing(name, routing))(config)
    model = build_meta_model(config)
    shards = _shards(_hub_tensors(model), shard_bytes)
    noise, done, item = Noise(seed), 0, 0
    total = sum(entry.nbytes for layout in shards.values() for entry in layout.entries)
    with _new_directory(Path(out), sum(layout.file_bytes for layout in shards.values())) as partial:
        for file, layout in shards.items():
            with _ShardWriter(partial / file, layout) as writer:
                for entry in layout.entries:
                    item += 1
                    writer.write(entry.key, _values(entry, item, noise, shape))
                    done += entry.nbytes
                    if progress:
                        progress(done, total, _place(entry.key))
        _write_small_files(partial, model, shards)
    return Path(out)


def _hub_tensors(model: PreTrainedModel) -> list[TensorEntry]:
    """The tensors `save_pretrained` would write, in the order of their names."""
    dtypes = parameter_dtypes(model)
    state = {
        name: tensor.to(dtypes[name])
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    apart = revert_weight_conversion(model, state)
    return [TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in apart.items()]


def _shards(tensors: list[TensorEntry], shard_bytes: int) -> dict[str, TensorFileLayout]:
    """File name -> layout, tensors in order, a new file where `shard_bytes` would be passed."""
    groups: list[list[TensorEntry]] = [[]]
    room = shard_bytes
    for entry in tensors:
        if groups[-1] and entry.nbytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(entry)
        room -= entry.nbytes
    names = [f"model-{index + 1:05}-of-{len(groups):05}.safetensors" for index in range(len(groups))]
    return {name: TensorFileLayout(tuple(group), {"format": "pt"}) for name, group in zip(names, groups)}


def _values(entry: TensorEntry, item: int, noise: Noise, shape: UniformRouting) -> Iterable[tuple[int, torch.Tensor]]:
    """(byte offset, piece) pairs. An expert's own matrix is no tensor of the model's, and as all others are."""
    if len(entry.shape) == 1:
        return [(0, shape.vector(entry.key, noise.normal(item, *entry.shape)).to(entry.dtype))]
    return noise.matrix(entry, item, STD if ".experts." in entry.key else shape.std(entry.key))


def _place(key: str) -> str:
    """What a progress bar says of a tensor."""
    parts = key.split(".")
    return f"layer {parts[parts.index('layers') + 1]}" if "layers" in parts else key


def _write_small_files(path: Path, model: PreTrainedModel, shards: dict[str, TensorFileLayout]) -> None:
    weight_map = {entry.key: file for file, layout in shards.items() for entry in layout.entries}
    sizes = {"total_size": sum(entry.nbytes for layout in shards.values() for entry in layout.entries)}
    index = json.dumps({"metadata": sizes, "weight_map": weight_map}, indent=2)
    (path / INDEX_FILE).write_text(index + "\n")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(path)
    pair_tokenizer().save_pretrained(path)


class _ShardWriter:
    """One safetensors file, written in place; what is written leaves the page cache as it goes."""

    def __init__(self, path: Path, layout: TensorFileLayout) -> None:
        self._layout = layout
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._file, layout.file_bytes)
        self._dirty_bytes = 0
        self._put(memoryview(layout.header), 0)

    def write(self, key: str, parts: Iterable[tuple[int, torch.Tensor]]) -> None:
        """parts: (byte offset within the tensor, piece) pairs that together cover it."""
        start, _ = self._layout.span(key)
        for offset, piece in parts:
            self._put(piece.contiguous().view(-1).view(torch.uint8).numpy().data, start + offset)

    def _put(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], offset + done)
        self._dirty_bytes += len(data)
        if self._dirty_bytes >= _SYNC_BYTES:
            self._sync()

    def _sync(self) -> None:
        os.fdatasync(self._file)
        drop_cache(self._file)
        self._dirty_bytes = 0

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            if exc_info[0] is None:
                self._sync()
        finally:
            os.close(self._file)


@contextmanager
def _new_directory(out: Path, size: int) -> Iterator[Path]:
    """`OUT.partial` with room for `size` bytes, renamed to `out` at the end, removed where it comes to none."""
    if out.exists():
        raise OutputExistsError(out)
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        raise UsageError(f"{partial} is in the way, perhaps of an earlier run: remove it or choose another OUT")
    partial.mkdir(parents=True)
    try:
        free = shutil.disk_usage(partial).free
        if size > free:
            raise DiskFullError(
                f"{out} needs {format_bytes(size)} and its file system has {format_bytes(free)} free: free some space, "
                "choose another OUT or fewer layers"
            )
        yield partial
        os.rename(partial, out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(f"the disk filled up while {out} was written: free some space and run it again") from error
    finally:
        if partial.exists():
            shutil.rmtree(partial)
