"""The plan of a conversion, and its execution item by item.

What is made of which tensors is planned first, on the meta device, so that a checkpoint that cannot be converted is
refused before a byte is written. Then one expert, or a few rows of a dense matrix, is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from fate.convert import Progress
from fate.convert.checkpoint import Checkpoint
from fate.convert.encode import common_unit, encode_record
from fate.convert.mapping import ExpertSource, Recipe, Source, plan_recipes
from fate.convert.source import copied_files, read_config
from fate.errors import CheckpointError, UsageError
from fate.models.adapter import MoELayer, build_meta_model, find_moe_layers
from fate.models.packable import packable, packed_ties
from fate.store.dtypes import RAW_DTYPES
from fate.store.format import (
    CONSTANTS_BYTES,
    FORMAT_VERSION,
    GROUP,
    LayerSpec,
    RecordLayout,
    StoreHeader,
    padded_cols,
)
from fate.store.plan import StorePlan, packed_layout, plan_store
from fate.store.reader import PACKED_FILE
from fate.store.tensorfile import TensorEntry
from fate.store.writer import StoreWriter

T = TypeVar("T")

_SLICE_BYTES = 32 * 1024**2  # of float32 rows of a dense matrix in memory at a time
_KEPT_CODECS = {RAW_DTYPES[codec]: codec for codec in ("bf16", "fp16")}


class Conversion:
    """The plan of one conversion, and its execution item by item."""

    def __init__(self, checkpoint: Checkpoint, expert_bits: int, dense_bits: int, trust_remote_code: bool) -> None:
        self._checkpoint = checkpoint
        self._model = build_meta_model(read_config(checkpoint, trust_remote_code), trust_remote_code)
        self._remote = trust_remote_code and self._model.is_custom_code()
        self._layers = find_moe_layers(self._model)
        self._stacked = {f"{layer.name}.{matrix.name}" for layer in self._layers for matrix in layer.matrices}
        self._recipes = plan_recipes(self._model, self._stacked, checkpoint)
        self._experts = [self._expert_matrices(layer) for layer in self._layers]
        self._made: tuple[Source | None, dict[str, torch.Tensor]] = (None, {})
        self.plan = self._plan(expert_bits, dense_bits)

    def run(self, writer: StoreWriter, progress: Progress) -> None:
        """Write every item that `writer` does not have yet."""
        total = self.plan.item_bytes
        experts = [(layer, expert) for layer in self._layers for expert in range(layer.num_experts)]
        missing = [(layer, expert) for layer, expert in experts if not writer.has_record(layer.index, expert)]
        sizes = [self.plan.header.layout(layer.index).record_bytes for layer in self._layers]
        done = sum(sizes[layer.index] for layer, _ in experts) - sum(sizes[layer.index] for layer, _ in missing)
        read = (partial(self._read_expert, layer, expert) for layer, expert in missing)
        for (layer, expert), matrices in zip(missing, one_ahead(read)):
            with _damage(f"{layer.name} expert {expert}"):
                record = encode_record(matrices, self.plan.header.layout(layer.index))
            writer.write_record(layer.index, expert, record)
            done += sizes[layer.index]
            progress(done, total, f"layer {layer.index} expert {expert}")
        for file, tensors in self.plan.tensor_files.items():
            for entry in tensors.entries:
                if not writer.has_tensor(file, entry.key):
                    with _damage(entry.key):
                        writer.write_tensor(file, entry.key, self._parts(file, entry.key))
                done += entry.nbytes
                progress(done, total, entry.key)

    def _read_expert(self, layer: MoELayer, expert: int) -> dict[str, torch.Tensor]:
        return {name: make(expert) for name, make in self._experts[layer.index].items()}

    def _expert_matrices(self, layer: MoELayer) -> dict[str, Callable[[int], torch.Tensor]]:
        """Matrix name -> a function from expert to its matrix in canonical orientation, [rows, cols]."""
        makers: dict[str, Callable[[int], torch.Tensor]] = {}
        for matrix in layer.matrices:
            source = ExpertSource(self._recipes[f"{layer.name}.{matrix.name}"], self._checkpoint, self._model)
            makers[matrix.name] = partial(source.make, transpose=bool(layer.experts.is_transposed))
        return makers

    def _parts(self, file: str, key: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(byte offset, piece) pairs of one tensor of a tensor file."""
        recipe = self._recipes[key]
        if file == PACKED_FILE:
            return _packed_parts(lambda: self._row_slices(recipe), self.plan.packed[key])
        row_bytes = self.plan.tensor_files[file].row_bytes(key)
        return ((start * row_bytes, rows) for start, rows in self._row_slices(recipe))

    def _row_slices(self, recipe: Recipe) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) that cover the parameter; tensors that need no converter are read slice by slice."""
        if recipe.source.converter or not recipe.shape:
            whole = self._make(recipe)[recipe.made]
            yield from ((0, whole),) if not recipe.shape else _sliced(recipe.shape, lambda a, b: whole[a:b])
        else:
            key = recipe.source.only_key
            yield from _sliced(recipe.shape, lambda a, b: self._checkpoint.read_rows(key, a, b).to(recipe.dtype))

    def _make(self, recipe: Recipe) -> dict[str, torch.Tensor]:
        """All that the recipe's source makes; kept until another is asked for, as one may make several neighbours."""
        source = recipe.source
        if self._made[0] is not source:
            self._made = (None, {})
            self._made = (source, source.make(lambda key: self._checkpoint.read(key).to(recipe.dtype), self._model))
        return self._made[1]

    def _plan(self, expert_bits: int, dense_bits: int) -> StorePlan:
        specs = tuple(LayerSpec(layer.name, layer.num_experts, layer.matrices) for layer in self._layers)
        fingerprint = _fingerprint(self._checkpoint, expert_bits, dense_bits)
        header = StoreHeader(self._expert_codec(expert_bits), fingerprint, self._model.config.model_type, specs)
        unstacked = {name: recipe for name, recipe in self._recipes.items() if name not in self._stacked}
        tensors = [TensorEntry(name, recipe.dtype, recipe.shape) for name, recipe in unstacked.items()]
        kinds = packable(self._model, self._layers) if dense_bits < 16 else {}
        ties = packed_ties(self._model, kinds)
        files = copied_files(self._checkpoint.path, code=self._remote)
        return plan_store(header, dense_bits, tensors, kinds, ties, self._store_config(), files)

    def _expert_codec(self, expert_bits: int) -> str:
        if expert_bits != 16:
            return {4: "int4", 32: "fp32"}[expert_bits]
        dtypes = {self._recipes[name].dtype for name in self._stacked}
        if len(dtypes) == 1 and (codec := _KEPT_CODECS.get(next(iter(dtypes)))):
            return codec
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UsageError(f"expert_bits=16 keeps bfloat16 or float16 experts as they are, not {names}: choose 4 or 32")

    def _store_config(self) -> dict[str, Any]:
        """The checkpoint's config.json, made to say what from_pretrained would otherwise find out from the weights."""
        dropped = ("transformers_weights",) if self._remote else ("auto_map", "transformers_weights")
        config = {key: value for key, value in self._checkpoint.config.items() if key not in dropped}
        if config.get("dtype", config.get("torch_dtype")) is None:
            config["dtype"] = str(self._model.dtype).removeprefix("torch.")
        if getattr(self._model.config, "tie_word_embeddings", False) and not self._model.all_tied_weights_keys:
            config["tie_word_embeddings"] = False  # the checkpoint holds two different matrices
        return config


def one_ahead(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of `calls`, each made by another thread while the one before it is used."""
    with ThreadPoolExecutor(1) as pool:
        coming: Future[T] | None = None
        for call in calls:
            before, coming = coming, pool.submit(call)
            if before is not None:
                yield before.result()
        if coming is not None:
            yield coming.result()


def _fingerprint(checkpoint: Checkpoint, expert_bits: int, dense_bits: int) -> str:
    """Identifies the source and everything that decides the store's bytes."""
    parts = [checkpoint.fingerprint(), FORMAT_VERSION, expert_bits, dense_bits]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@contextmanager
def _damage(what: str) -> Iterator[None]:
    """Weights that are no numbers cannot be quantized; say whose they are."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{what}: {error}; download the checkpoint again") from error


def _sliced(shape: tuple[int, ...], read: Callable[[int, int], torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    step = max(1, _SLICE_BYTES // (4 * max(1, math.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield start, read(start, min(start + step, shape[0]))


def _packed_parts(
    slices: Callable[[], Iterator[tuple[int, torch.Tensor]]], layout: RecordLayout
) -> Iterator[tuple[int, torch.Tensor]]:
    """(byte offset in the packed matrix, piece): rows are quantized slice by slice, each section spliced in place.

    Rows depend on each other only through the matrix's unit, so the codes are those of the matrix quantized whole. The
    INT2 slope is that of the first slice: dense matrices are never read at INT2.
    """
    matrix, whole = layout.matrices[0], layout.sections[0]
    unit = common_unit((rows for _, rows in slices()), matrix.name)
    codes = padded_cols(matrix.cols) // (4 if layout.codec == "int4" else 1)  # bytes of one row of a plane
    affine = padded_cols(matrix.cols) // GROUP * 4
    for start, rows in slices():
        sliced = packed_layout(layout.codec, len(rows), matrix.cols)
        record, part = encode_record({matrix.name: rows}, sliced, unit), sliced.sections[0]
        if start == 0:
            yield 0, record[:CONSTANTS_BYTES]
        yield whole.high + start * codes, record[part.high : part.high + len(rows) * codes]
        yield whole.affine + start * affine, record[part.affine : part.affine + len(rows) * affine]
        if whole.low is not None and part.low is not None:
            yield whole.low + start * codes, record[part.low : part.low + len(rows) * codes]
