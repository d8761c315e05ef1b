"""The peer's files hold the store's weights: read back by the `gguf` package's own reader and dequantizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from benchmarks.peers import gguf_file
from benchmarks.peers.gguf_file import GgufFile, write_gguf
from benchmarks.peers.q4 import blocks, q4_0
from fate.convert.encode import quantize_matrix
from fate.errors import UsageError
from fate.kernels.reference import dequantize
from fate.store.ahead import DenseWeights
from fate.store.format import MatrixSpec, RecordLayout
from fate.store.plan import packed_layout
from fate.store.reader import EXPERTS_FILE, StoreReader
from tiny import tiny_store

WIDE = {"hidden_size": 128, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def store() -> Path:
    return tiny_store("qwen2_moe", dense_bits=4, **WIDE)


def tensors(file: GgufFile) -> dict[str, np.ndarray]:
    """Name -> float32 weights."""
    reader = gguf.GGUFReader(file.path)
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def expert(store: Path, layer: int, index: int, matrix: int) -> torch.Tensor:
    reader = StoreReader(store)
    reader.close()
    layout = reader.header.layout(layer)
    with open(store / EXPERTS_FILE, "rb") as file:
        file.seek(reader.header.record_offset(layer, index))
        record = torch.frombuffer(bytearray(file.read(layout.record_bytes)), dtype=torch.uint8)
    return dequantize(record, layout, matrix)


def error(found: np.ndarray, exact: torch.Tensor) -> float:
    return float((torch.from_numpy(np.array(found)) - exact).norm() / exact.norm())


def test_q4_1_holds_the_stores_weights(store: Path, tmp_path: Path) -> None:
    file = write_gguf(store, tmp_path / "x.gguf", "q4_1")
    assert file.rounding == 0.0
    found = tensors(file)
    gate, up = expert(store, 1, 5, 0).chunk(2)
    for name, exact in (("gate", gate), ("up", up), ("down", expert(store, 1, 5, 1))):
        assert error(found[f"blk.1.ffn_{name}_exps.weight"][5], exact) < 1e-7
    with DenseWeights(store) as reading:
        dense = {name: torch.frombuffer(view, dtype=torch.uint8) for name, view in reading.matrices()}
    for key, name, shape in (("lm_head", "output", (259, 128)), ("model.embed_tokens", "token_embd", (259, 128))):
        exact = dequantize(dense[f"{key}.weight"], packed_layout("int4", *shape), 0)
        assert error(found[f"{name}.weight"], exact) < 1e-7
    assert found["blk.0.ffn_gate_inp_shexp.weight"].shape == (128,)
    assert found["blk.0.attn_q.bias"].shape == (128,)


def test_q4_0_is_as_the_gguf_package_quantizes() -> None:
    weights = torch.randn(5, 128, generator=torch.Generator().manual_seed(2))
    weights[1, :32] = 0.0
    theirs = gguf.quants.quantize(weights.numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(q4_0(weights).numpy(), theirs)


def test_q4_0_of_a_store(store: Path, tmp_path: Path) -> None:
    found = tensors(write_gguf(store, tmp_path / "x.gguf", "q4_0"))
    assert 0.01 < error(found["blk.0.ffn_down_exps.weight"][2], expert(store, 0, 2, 1)) < 0.12


def test_codes_of_a_power_of_two_gain_are_exact() -> None:
    weights = torch.randn(6, 192, generator=torch.Generator().manual_seed(1))
    layout = RecordLayout("int4", (MatrixSpec("weight", 6, 192),), page_aligned=False)
    record = quantize_matrix(weights, "int4")
    packed, rounding = blocks(record, layout, 0, "q4_1")
    values = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType.Q4_1)
    assert rounding == 0.0
    assert np.array_equal(values, dequantize(record, layout, 0).numpy())
    record[:4] = torch.tensor([0.3 * 2.0**-10]).view(torch.uint8)
    packed, rounding = blocks(record, layout, 0, "q4_1")
    values = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType.Q4_1)
    assert 1e-5 < rounding < 1e-3
    assert 0 < error(values, dequantize(record, layout, 0)) < 1e-3


def test_slices_of_rows_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = RecordLayout("int4", (MatrixSpec("weight", 7, 128),), page_aligned=False)
    record = quantize_matrix(torch.randn(7, 128, generator=torch.Generator().manual_seed(1)), "int4")
    whole = blocks(record, layout, 0, "q4_0")[0]
    monkeypatch.setattr("benchmarks.peers.q4.SLICE_WEIGHTS", 300)
    assert torch.equal(blocks(record, layout, 0, "q4_0")[0], whole)


def test_what_llama_cpp_must_know(store: Path, tmp_path: Path) -> None:
    fields = gguf.GGUFReader(write_gguf(store, tmp_path / "x.gguf", "q4_1").path).fields
    for name, value in (("expert_count", 8), ("expert_used_count", 3), ("expert_feed_forward_length", 64)):
        assert fields[f"qwen2moe.{name}"].contents() == value
    assert fields["tokenizer.ggml.model"].contents() == "none"


def test_a_file_of_this_store_is_not_written_again(store: Path, tmp_path: Path) -> None:
    first = write_gguf(store, tmp_path / "x.gguf", "q4_1")
    times = first.path.stat().st_mtime_ns
    assert write_gguf(store, tmp_path / "x.gguf", "q4_1") == first
    assert first.path.stat().st_mtime_ns == times
    other = tiny_store("qwen2_moe", dense_bits=4, seed=1, **WIDE)
    write_gguf(other, tmp_path / "x.gguf", "q4_1")
    assert first.path.stat().st_mtime_ns != times


def test_a_failure_leaves_no_file(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(record: torch.Tensor, layout: RecordLayout, index: int, form: str) -> Any:
        if len(layout.matrices) > 1:
            raise OSError("no space")  # at the first expert, behind the dense matrices
        return blocks(record, layout, index, form)

    monkeypatch.setattr(gguf_file, "blocks", fail)
    with pytest.raises(OSError):
        write_gguf(store, tmp_path / "x.gguf", "q4_1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "family, options, words",
    [
        ("mixtral", {"dense_bits": 4}, "model type 'mixtral': the comparison knows qwen2_moe"),
        ("qwen2_moe", {"dense_bits": 8, **WIDE}, "is not INT4 throughout"),
        ("qwen2_moe", {"dense_bits": 4}, "has matrices of 48 columns: GGUF needs whole 64s"),
    ],
)
def test_stores_it_cannot_hold(family: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        write_gguf(tiny_store(family, **options), tmp_path / "x.gguf", "q4_1")
