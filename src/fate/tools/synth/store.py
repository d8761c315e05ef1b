"""Stores of full-size models with random weights, written at disk speed: for speed work without a download.

Codes are drawn as packed bytes under scales that give dequantized weights zero mean and the standard deviation wanted;
nothing is quantized. `routing.py` says which deviations and vectors, and with them how the store routes: about as
trained models do (`real`) or nearly uniformly over experts (`uniform`). Random weights all of one size would route
neither way: hidden states of all tokens collapse into one direction and with them the routing.

>>> synth("qwen1.5-moe-a2.7b", Path("synthetic-qwen"), num_layers=2)
PosixPath('synthetic-qwen')
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from fate.convert import DENSE_BITS, Progress
from fate.convert.mapping import parameter_dtypes
from fate.convert.source import copied_files
from fate.errors import UnknownNameError, UsageError
from fate.models.adapter import build_meta_model, find_moe_layers
from fate.models.packable import packable, packed_ties
from fate.store.format import CONSTANTS_BYTES, FORMAT_VERSION, GROUP, LayerSpec, RecordLayout, StoreHeader, padded_cols
from fate.store.plan import StorePlan, plan_store
from fate.store.tensorfile import TensorEntry
from fate.store.writer import StoreWriter
from fate.tools.synth.routing import ROUTINGS, STD, UniformRouting
from fate.tools.synth.shapes import COMMON, MODELS, default_routing

_GAIN = 2.0**-13  # keeps stored scales in the middle of float16's range
_INT2_SLOPE = 1.0625  # <w, w> / <w, w_int2> of uniform codes: 21.25 / 20
POOL_BYTES = 64 * 1024**2
_STRIDE = 4096 * 1001 + 64  # no two of a model's items begin at the same place of the pool
_BLOCK_ITEMS = 4099  # more than a model has, so that the blocks of one tensor begin apart too
_CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def synth(
    name: str,
    out: Path,
    seed: int = 0,
    dense_bits: int = 4,
    num_layers: int | None = None,
    progress: Progress | None = None,
    routing: str | None = None,
) -> Path:
    """Write a store of random weights of the shapes of `name` (one of MODELS) at `out`, and return `out`.

    Experts are INT4; dense_bits is 4, 8 or 16. num_layers: the model's own unless given. routing: "real", the default
    where the model has it, or "uniform", see `routing.py`. Memory stays under a few hundred MiB.
    Raises UnknownNameError, UsageError, OutputExistsError or DiskFullError.
    """
    config = synth_config(name, num_layers)
    if dense_bits not in DENSE_BITS:
        raise UsageError(f"dense_bits={dense_bits}: choose from {DENSE_BITS}")
    routing = default_routing(name, routing)
    shape = ROUTINGS.get(routing)(config)
    plan = _plan(config, seed, dense_bits, routing)
    noise = Noise(seed)
    done, total = 0, plan.item_bytes
    with StoreWriter(Path(out), plan) as writer:
        for what, size in _write_items(writer, noise, shape):
            done += size
            if progress:
                progress(done, total, what)
        return writer.finalize()


def synth_config(name: str, num_layers: int | None = None) -> PreTrainedConfig:
    """The configuration of `name`, of `num_layers` layers where given. Raises UnknownNameError."""
    if name not in MODELS:
        raise UnknownNameError("synthetic model", name, MODELS)
    fewer = {"num_hidden_layers": num_layers} if num_layers else {}
    return AutoConfig.for_model(**{**COMMON, **MODELS[name], **fewer})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes (ids 0 to 255) and <bos>, <eos>, <pad> (256 to 258), with a plain chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=1 << 20
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """`byte_tokenizer` whose tokens are pairs of printable characters where it can: 9,475 ids, so that neighbouring
    tokens of a text are seldom the same and routing that depends on the token varies as it does in real models."""
    symbols = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a"]  # byte-level names of space and newline
    pairs = [(first, second) for first in symbols for second in symbols]
    fast = byte_tokenizer()
    vocabulary = fast.get_vocab() | {first + second: 259 + index for index, (first, second) in enumerate(pairs)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\s\S]{1,2}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer)


class Noise:
    """Random bytes and normal numbers from pools drawn once; items differ by where in the pool they begin."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._bytes = torch.randint(256, (POOL_BYTES,), dtype=torch.uint8, generator=generator)
        self._normal = torch.randn(POOL_BYTES // 16, generator=generator)

    def record(self, layout: RecordLayout, item: int, std: float = STD) -> torch.Tensor:
        """uint8 [layout.record_bytes]: uniform codes under scales that give zero mean and standard deviation `std`."""
        record = _cycled(self._bytes, item, layout.record_bytes)
        record[:CONSTANTS_BYTES] = 0
        record[layout.payload_bytes :] = 0
        levels, slope = (15, _INT2_SLOPE) if layout.codec == "int4" else (255, 1.0)
        scale = STD / math.sqrt(((levels + 1) ** 2 - 1) / 12) / _GAIN
        for index, (matrix, section) in enumerate(zip(layout.matrices, layout.sections)):
            constants = torch.tensor([_GAIN * std / STD, slope], dtype=torch.float32)
            record[8 * index : 8 * index + 8] = constants.view(torch.uint8)
            affine = torch.empty(matrix.rows, 2, padded_cols(matrix.cols) // GROUP, dtype=torch.float16)
            affine[:, 0], affine[:, 1] = scale, -scale * levels / 2
            record[section.affine : section.affine + affine.nbytes] = affine.view(torch.uint8).reshape(-1)
        return record

    def normal(self, item: int, count: int) -> torch.Tensor:
        """float32 [count] of mean 0 and standard deviation 1."""
        return _cycled(self._normal, item, count)

    def matrix(self, entry: TensorEntry, item: int, std: float) -> Iterator[tuple[int, torch.Tensor]]:
        """(byte offset, piece) pairs of a dense tensor of normal numbers."""
        step = self._normal.numel() * entry.dtype.itemsize
        for block, at in enumerate(range(0, entry.nbytes, step)):
            count = min(step, entry.nbytes - at) // entry.dtype.itemsize
            yield at, (self.normal(item + block * _BLOCK_ITEMS, count) * std).to(entry.dtype)


def _cycled(pool: torch.Tensor, item: int, count: int) -> torch.Tensor:
    """A copy of `count` elements of the pool, round and round from a place of the item's own."""
    start = item * _STRIDE % len(pool)
    turns = -(-(start + count) // len(pool))
    return (
        torch.cat([pool[start:], *([pool] * (turns - 1))])[:count] if turns > 1 else pool[start : start + count].clone()
    )


def _write_items(writer: StoreWriter, noise: Noise, shape: UniformRouting) -> Iterator[tuple[str, int]]:
    """Write what `writer` lacks; yields (what, bytes) after each item."""
    item = 0
    for layer, spec in enumerate(writer.plan.header.layers):
        layout = writer.plan.header.layout(layer)
        for expert in range(spec.num_experts):
            item += 1
            if not writer.has_record(layer, expert):
                writer.write_record(layer, expert, noise.record(layout, item))
            yield f"layer {layer} expert {expert}", layout.record_bytes
    for file, tensors in writer.plan.tensor_files.items():
        for entry in tensors.entries:
            item += 1
            if not writer.has_tensor(file, entry.key):
                packed = writer.plan.packed.get(entry.key)
                writer.write_tensor(file, entry.key, _tensor_parts(entry, packed, item, noise, shape))
            yield entry.key, entry.nbytes


def _tensor_parts(
    entry: TensorEntry, packed: RecordLayout | None, item: int, noise: Noise, shape: UniformRouting
) -> Iterable[tuple[int, torch.Tensor]]:
    """(byte offset, piece) pairs of a tensor. packed: its layout where it is a packed matrix."""
    if packed is not None:
        return [(0, noise.record(packed, item, shape.std(entry.key)))]
    if len(entry.shape) == 1:
        return [(0, shape.vector(entry.key, noise.normal(item, *entry.shape)).to(entry.dtype))]
    return noise.matrix(entry, item, shape.std(entry.key))


def _plan(config: PreTrainedConfig, seed: int, dense_bits: int, routing: str) -> StorePlan:
    model = build_meta_model(config)
    layers = find_moe_layers(model)
    stacked = {f"{layer.name}.{matrix.name}" for layer in layers for matrix in layer.matrices}
    dtypes = parameter_dtypes(model)
    tensors = [
        TensorEntry(name, dtypes[name], tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in stacked and name not in model.all_tied_weights_keys
    ]
    raw = json.loads(config.to_json_string())
    raw["architectures"] = [type(model).__name__]
    origin = ["synth", FORMAT_VERSION, raw, seed, dense_bits, routing]
    fingerprint = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        pair_tokenizer().save_pretrained(folder)
        files = copied_files(Path(folder))
    specs = tuple(LayerSpec(layer.name, layer.num_experts, layer.matrices) for layer in layers)
    header = StoreHeader("int4", fingerprint, config.model_type, specs)
    kinds = packable(model, layers) if dense_bits < 16 else {}
    return plan_store(header, dense_bits, tensors, kinds, packed_ties(model, kinds), raw, files)
