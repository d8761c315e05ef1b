"""The matrices that known models multiply by: what `fate bench kernels` measures.

>>> known_shapes(["olmoe-1b-7b"])[0].hidden
2048
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fate.errors import UnknownNameError
from fate.models.config import transformers_config
from fate.store.format import MatrixSpec, RecordLayout
from fate.store.reader import StoreReader, read_config


@dataclass(frozen=True)
class Linear:
    """A dense matrix [rows, cols]. once: for one token of a forward only, as a language model's head."""

    name: str
    rows: int
    cols: int
    once: bool = False


@dataclass(frozen=True)
class ModelShape:
    """What one MoE layer and its dense neighbours multiply by. intermediate: of one routed expert."""

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    num_experts_per_tok: int
    linears: tuple[Linear, ...]

    def expert_layout(self, codec: str) -> RecordLayout:
        gate_up = MatrixSpec("gate_up_proj", 2 * self.intermediate, self.hidden)
        return RecordLayout(codec, (gate_up, MatrixSpec("down_proj", self.hidden, self.intermediate)))


def _attention(hidden: int, queries: int, keys: int, vocabulary: int) -> tuple[Linear, ...]:
    return (
        Linear("query", queries, hidden),
        *((Linear("key", keys, hidden),) if keys != queries else ()),
        *((Linear("attention out", hidden, queries),) if hidden != queries else ()),
        Linear("head", vocabulary, hidden, once=True),
    )


_SHARED = (Linear("shared gate", 5632, 2048), Linear("shared down", 2048, 5632))
SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("qwen1.5-moe-a2.7b", 2048, 1408, 60, 4, (*_SHARED, *_attention(2048, 2048, 2048, 151936))),
        ModelShape("deepseek-moe-16b", 2048, 1408, 64, 6, _attention(2048, 2048, 2048, 102400)),
        ModelShape("olmoe-1b-7b", 2048, 1024, 64, 8, _attention(2048, 2048, 2048, 50304)),
        ModelShape("qwen3-30b-a3b", 2048, 768, 128, 8, _attention(2048, 4096, 512, 151936)),
        ModelShape("mixtral-8x7b", 4096, 14336, 8, 2, _attention(4096, 4096, 1024, 32000)),
    )
}


def known_shapes(names: Sequence[str]) -> list[ModelShape]:
    """Raises UnknownNameError."""
    for name in names:
        if name not in SHAPES:
            raise UnknownNameError("shape", name, SHAPES)
    return [SHAPES[name] for name in names]


def store_shape(store: Path) -> ModelShape:
    """The first MoE layer of a store and its distinct packed matrices, each under the first module's name."""
    reader = StoreReader(store)
    reader.close()
    layer = reader.header.layers[0]
    config = transformers_config(store).get_text_config()
    gate_up, down = layer.matrices[:2]
    distinct: dict[tuple[int, int], Linear] = {}
    for name, entry in read_config(store)["quantization_config"]["packed"].items():
        if entry["kind"] == "linear":
            shape = (entry["rows"], entry["cols"])
            distinct.setdefault(shape, Linear(name, *shape, once=name.endswith("lm_head")))
    return ModelShape(
        store.name, gate_up.cols, down.cols, layer.num_experts, config.num_experts_per_tok, tuple(distinct.values())
    )
