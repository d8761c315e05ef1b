"""A store's weights as a GGUF file for llama.cpp: written once, a layer of experts in memory at a time.

Needs the `gguf` package. Token ids are fed as they are, so the file has no vocabulary. What the store does not pack
(norms, biases, routers) becomes float32.

>>> write_gguf(Path("qwen.fate"), Path("qwen.q4_1.gguf"), "q4_1").rounding
0.0
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.peers.q4 import BLOCK, BLOCK_BYTES, blocks
from fate.convert import Progress
from fate.core import ExpertKey
from fate.errors import UsageError
from fate.models.config import transformers_config
from fate.store.ahead import DenseWeights
from fate.store.plan import packed_layout
from fate.store.reader import DENSE_FILE, StoreReader, read_config

_ARCHITECTURES = {"qwen2_moe": "QWEN2MOE"}
_EXPERTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class GgufFile:
    """rounding: see `q4.blocks`, the largest of all matrices. file_bytes: its size."""

    path: Path
    form: str
    rounding: float
    file_bytes: int


def write_gguf(store: Path, path: Path, form: str, progress: Progress = lambda done, total, what: None) -> GgufFile:
    """Write (or, where `path` is of this very store, find) the file. form: "q4_1" or "q4_0".

    Raises UsageError for a store llama.cpp's file cannot hold, or without the `gguf` package.
    """
    reader = StoreReader(store)
    note = path.with_suffix(".json")
    try:
        if path.is_file() and (found := _read_note(note)) and found.pop("fingerprint") == reader.header.fingerprint:
            return GgufFile(path, **found)
        _check(reader)
        rounding = _Writer(reader, path, form).write(progress)
    finally:
        reader.close()
    written = GgufFile(path, form, rounding, path.stat().st_size)
    note.write_text(json.dumps({**asdict(written), "path": None, "fingerprint": reader.header.fingerprint}))
    return written


def _read_note(note: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    found.pop("path", None)
    return found


def load_gguf() -> Any:
    """The `gguf` package; UsageError where it is missing."""
    try:
        import gguf
    except ImportError:
        raise UsageError("the gguf package is missing: pip install 'fate-moe[peers]'") from None
    return gguf


def _check(reader: StoreReader) -> None:
    header, stored = reader.header, read_config(reader.path)["quantization_config"]
    if header.model_type not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UsageError(f"{reader.path} is of model type {header.model_type!r}: the comparison knows {known}")
    others = sorted({entry["codec"] for entry in stored["packed"].values()} - {"int4"})
    if set(header.codecs) != {"int4"} or others or not stored["packed"] or stored["tied"]:
        raise UsageError(
            f"{reader.path} is not INT4 throughout with untied embeddings, which is what a GGUF file can hold exactly: "
            "convert with --expert-bits 4 --dense-bits 4"
        )
    widths = {m.cols for layer in header.layers for m in layer.matrices} | {
        e["cols"] for e in stored["packed"].values()
    }
    if any(cols % 64 for cols in widths):
        raise UsageError(
            f"{reader.path} has matrices of {min(c for c in widths if c % 64)} columns: GGUF needs whole 64s"
        )


class _Writer:
    """One file. Tensors are announced first and then written in the same order."""

    def __init__(self, reader: StoreReader, path: Path, form: str) -> None:
        self._gguf, self._reader, self._path, self._form = load_gguf(), reader, path, form
        config = transformers_config(reader.path)
        architecture = getattr(self._gguf.MODEL_ARCH, _ARCHITECTURES[reader.header.model_type])
        self._names = self._gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        self._type = getattr(self._gguf.GGMLQuantizationType, form.upper())
        self._partial = path.with_name(path.name + ".partial")
        self._out = self._gguf.GGUFWriter(self._partial, self._gguf.MODEL_ARCH_NAMES[architecture])
        self._rounding = 0.0
        with DenseWeights(reader.path) as dense:
            self._packed = {name: torch.frombuffer(view, dtype=torch.uint8) for name, view in dense.matrices()}
        _describe(self._out, config, getattr(self._gguf.LlamaFileType, f"MOSTLY_{form.upper()}"))

    def write(self, progress: Progress) -> float:
        """Returns the rounding."""
        try:
            self._announce()
            self._out.write_header_to_file()
            self._out.write_kv_data_to_file()
            self._out.write_ti_data_to_file()
            total = sum(info.nbytes for infos in self._out.tensors for info in infos.values())
            done = 0
            for what, values in self._values():
                self._out.write_tensor_data(values)
                done += values.nbytes
                progress(done, total, what)
            self._out.close()
            os.replace(self._partial, self._path)
        finally:
            self._partial.unlink(missing_ok=True)
        return self._rounding

    def _announce(self) -> None:
        with safe_open(self._reader.path / DENSE_FILE, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                shape = _squeezed(tuple(file.get_slice(key).get_shape()))
                size = 4 * int(np.prod(shape))
                self._out.add_tensor_info(self._name(key), shape, np.dtype(np.float32), size)
        packed = read_config(self._reader.path)["quantization_config"]["packed"]
        for key in self._packed:
            entry = packed[key.removesuffix(".weight")]
            self._announce_blocks(key, (entry["rows"], entry["cols"]))
        for layer in self._reader.header.layers:
            gate_up, down = layer.matrices
            halves = [(gate_up.rows // 2, gate_up.cols)] * 2
            for name, shape in zip(_EXPERTS, [*halves, (down.rows, down.cols)]):
                self._announce_blocks(f"{layer.module}.{name}.weight", (layer.num_experts, *shape))

    def _announce_blocks(self, key: str, shape: tuple[int, ...]) -> None:
        row = shape[-1] // BLOCK * BLOCK_BYTES[self._form]
        size = int(np.prod(shape[:-1])) * row
        self._out.add_tensor_info(self._name(key), (*shape[:-1], row), np.dtype(np.uint8), size, self._type)

    def _values(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor in the order announced."""
        with safe_open(self._reader.path / DENSE_FILE, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                yield key, file.get_tensor(key).float().numpy()
        packed = read_config(self._reader.path)["quantization_config"]["packed"]
        for key, record in self._packed.items():
            entry = packed[key.removesuffix(".weight")]
            yield key, self._blocks(record, packed_layout("int4", entry["rows"], entry["cols"]), 0).numpy()
        for index, layer in enumerate(self._reader.header.layers):
            for values in self._layer(index, layer.num_experts):
                yield f"layer {index}", values

    def _layer(self, layer: int, experts: int) -> list[np.ndarray]:
        """Gate, up and down of all of a layer's experts, stacked."""
        layout = self._reader.header.layout(layer)
        parts: list[list[torch.Tensor]] = [[], [], []]
        with mmap.mmap(-1, layout.record_bytes) as buffer:
            record = torch.frombuffer(buffer, dtype=torch.uint8)
            for expert in range(experts):
                self._reader.read_into(ExpertKey(layer, expert), memoryview(buffer), 0)
                gate_up = self._blocks(record, layout, 0)
                for part, values in zip(parts, (*gate_up.chunk(2), self._blocks(record, layout, 1))):
                    part.append(values)
            del record
        return [torch.stack(part).numpy() for part in parts]

    def _blocks(self, record: torch.Tensor, layout: Any, index: int) -> torch.Tensor:
        values, rounding = blocks(record, layout, index, self._form)
        self._rounding = max(self._rounding, rounding)
        return values

    def _name(self, key: str) -> str:
        name = self._names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        return str(name)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A matrix of one row is a vector to llama.cpp."""
    return shape[1:] if len(shape) == 2 and shape[0] == 1 else shape


def _describe(out: Any, config: Any, file_type: int) -> None:
    """What llama.cpp must know of a qwen2_moe besides its tensors."""
    pairs: list[tuple[Callable[[Any], None], Any]] = [
        (out.add_file_type, file_type),
        (out.add_context_length, config.max_position_embeddings),
        (out.add_embedding_length, config.hidden_size),
        (out.add_block_count, config.num_hidden_layers),
        (out.add_feed_forward_length, config.intermediate_size),
        (out.add_head_count, config.num_attention_heads),
        (out.add_head_count_kv, config.num_key_value_heads),
        (out.add_rope_freq_base, config.rope_parameters["rope_theta"]),
        (out.add_layer_norm_rms_eps, config.rms_norm_eps),
        (out.add_expert_count, config.num_experts),
        (out.add_expert_used_count, config.num_experts_per_tok),
        (out.add_expert_feed_forward_length, config.moe_intermediate_size),
        (out.add_expert_shared_feed_forward_length, config.shared_expert_intermediate_size),
        (out.add_vocab_size, config.vocab_size),
        (out.add_tokenizer_model, "none"),
    ]
    for add, value in pairs:
        add(value)
