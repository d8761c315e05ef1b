"""Synthetic stores: the shapes stated, zero-mean weights of the stated deviation, every expert its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from fate.errors import OutputExistsError, UnknownNameError, UsageError
from fate.kernels import SWIGLU
from fate.models.activation import recognise
from fate.models.adapter import build_meta_model, find_moe_layers
from fate.store.format import GROUP, RecordLayout, padded_cols
from fate.store.packing import restore, unpack_plane
from fate.store.plan import packed_layout
from fate.store.reader import DENSE_FILE, EXPERTS_FILE, PACKED_FILE, StoreReader
from fate.store.tensorfile import TensorEntry
from fate.tools.synth.routing import EMBEDDING_STD, STD
from fate.tools.synth.store import MODELS, Noise, byte_tokenizer, synth
from tiny import FAMILIES


@pytest.fixture
def tiny_name(monkeypatch: pytest.MonkeyPatch) -> str:
    settings = {**FAMILIES["qwen2_moe"], "hidden_size": 192, "vocab_size": 512, "moe_intermediate_size": 96}
    monkeypatch.setattr("fate.tools.synth.store.POOL_BYTES", 1 << 23)  # tiny matrices need no more
    monkeypatch.setitem(MODELS, "tiny", {"model_type": "qwen2_moe", **settings})
    return "tiny"


def _weights(record: torch.Tensor, layout: RecordLayout, index: int) -> torch.Tensor:
    """Dequantized matrix, from the words of the format's specification."""
    matrix, section = layout.matrices[index], layout.sections[index]
    padded = padded_cols(matrix.cols)
    gain = record[8 * index : 8 * index + 4].view(torch.float32)
    if section.low is None:
        codes = restore(record[section.high : section.high + matrix.rows * padded].view(matrix.rows, padded))
    else:
        planes = [
            unpack_plane(record[at : at + matrix.rows * padded // 4].view(matrix.rows, padded // 4), padded)
            for at in (section.high, section.low)
        ]
        codes = 4 * planes[0] + planes[1]
    affine = record[section.affine : section.affine + matrix.rows * padded // GROUP * 4].view(torch.float16)
    scale, offset = affine.view(matrix.rows, 2, -1, 1).float().unbind(1)
    values = gain * (scale * codes.view(matrix.rows, -1, GROUP).float() + offset)
    return values.view(matrix.rows, padded)[:, : matrix.cols]


@pytest.mark.parametrize("dense_bits", [4, 8, 16])
def test_weights_have_zero_mean_and_the_stated_deviation(tiny_name: str, dense_bits: int, tmp_path: Path) -> None:
    out = synth(tiny_name, tmp_path / "out", dense_bits=dense_bits)
    reader = StoreReader(out)
    reader.close()
    header, data = reader.header, (out / EXPERTS_FILE).read_bytes()
    seen = set()
    for index, spec in enumerate(header.layers):
        layout = header.layout(index)
        for expert in range(spec.num_experts):
            start = header.record_offset(index, expert)
            record = torch.frombuffer(bytearray(data[start : start + layout.record_bytes]), dtype=torch.uint8)
            seen.add(xxhash.xxh64_intdigest(record.numpy().data))
            for matrix in range(2):
                values = _weights(record, layout, matrix)
                assert values.std() == pytest.approx(STD, rel=0.03)
                assert abs(float(values.mean())) < STD / 20
    assert len(seen) == header.num_records
    dense = load_file(out / DENSE_FILE)
    assert ("model.embed_tokens.weight" in dense) is (dense_bits == 16)
    if dense_bits < 16:
        layout = packed_layout(f"int{dense_bits}", 512, 192)
        values = _weights(load_file(out / PACKED_FILE)["model.embed_tokens.weight"], layout, 0)
    else:
        values = dense["model.embed_tokens.weight"].float()
    assert values.std() == pytest.approx(EMBEDDING_STD, rel=0.03)
    assert torch.equal(dense["model.norm.weight"], torch.ones(192, dtype=torch.bfloat16))


def test_the_same_seed_gives_the_same_bytes(tiny_name: str, tmp_path: Path) -> None:
    first, again, other = (
        synth(tiny_name, tmp_path / name, seed=seed) for name, seed in [("a", 3), ("b", 3), ("c", 4)]
    )
    assert (first / EXPERTS_FILE).read_bytes() == (again / EXPERTS_FILE).read_bytes()
    assert (first / EXPERTS_FILE).read_bytes() != (other / EXPERTS_FILE).read_bytes()


def test_blocks_of_a_large_matrix_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fate.tools.synth.store.POOL_BYTES", 1 << 18)  # a pool of 2^14 numbers
    entry = TensorEntry("matrix", torch.bfloat16, (64, 512))
    first, second = (piece for _, piece in Noise(0).matrix(entry, 1, STD))
    assert first.numel() + second.numel() == 64 * 512
    assert not torch.equal(first, second)


def test_the_int2_slope_is_unbiased_for_uniform_codes(tiny_name: str, tmp_path: Path) -> None:
    out = synth(tiny_name, tmp_path / "out", num_layers=1)
    reader = StoreReader(out)
    reader.close()
    start = reader.header.record_offset(0, 0)
    constants = (out / EXPERTS_FILE).read_bytes()[start : start + 8]
    slope = float(torch.frombuffer(bytearray(constants), dtype=torch.float32)[1])
    codes = torch.arange(16.0)
    exact, coarse = codes - 7.5, 4 * (codes // 4) + 1.5 - 7.5
    assert slope == pytest.approx(float(exact @ exact / (exact @ coarse)))


@pytest.mark.parametrize(
    "name, layers, experts, top_k, parameters_billion",
    [("qwen1.5-moe-a2.7b", 24, 60, 4, 14.3), ("deepseek-moe-16b", 27, 64, 6, 16.4)],
)
def test_full_size_shapes(name: str, layers: int, experts: int, top_k: int, parameters_billion: float) -> None:
    config = AutoConfig.for_model(**MODELS[name])
    model = build_meta_model(config)
    found = find_moe_layers(model)
    assert (len(found), found[0].num_experts, config.num_experts_per_tok) == (layers, experts, top_k)
    assert [(m.rows, m.cols) for m in found[0].matrices] == [(2816, 2048), (2048, 1408)]
    assert recognise(found[0].experts) == SWIGLU
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(parameters_billion, abs=0.05)


def test_text_can_be_fed(tiny_name: str, tmp_path: Path) -> None:
    out = synth(tiny_name, tmp_path / "out", num_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "Once upon a time, naïve — 3 × 4\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) < 0.7 * len(text.encode()), "pairs of characters"
    assert tokenizer.decode(ids) == text
    assert len(set(tokenizer("the cat sat on the mat")["input_ids"])) > 8
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == byte_tokenizer().apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "user: hi\nassistant:"


def test_wrong_requests_are_refused(tiny_name: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"deepseek-moe-16b, deepseek-v2-lite"):
        synth("gpt-5", tmp_path / "out")
    with pytest.raises(UnknownNameError, match="unknown routing 'random': choose one of real, uniform"):
        synth(tiny_name, tmp_path / "out", routing="random")
    with pytest.raises(UsageError, match="dense_bits=5"):
        synth(tiny_name, tmp_path / "out", dense_bits=5)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError):
        synth(tiny_name, tmp_path / "out")
