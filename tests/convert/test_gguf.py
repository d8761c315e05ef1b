"""GGUF files give the model that transformers' own reader makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import fate
from fate.convert import convert
from fate.convert.quantized.gguf import gguf_config
from fate.errors import CheckpointError, UnsupportedModelError
from tiny import tiny_model

gguf = pytest.importorskip("gguf", reason="pip install fate-moe[gguf]")
SIZES = {"moe_intermediate_size": 64, "tie_word_embeddings": False, "head_dim": 32}


@pytest.mark.parametrize("quantized", [False, True])
def test_a_gguf_file_is_what_transformers_makes_of_it(quantized: bool, tmp_path: Path) -> None:
    file = _write(tmp_path / "tiny.gguf", quantized)
    reference: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, config=gguf_config(file), dtype="float32"
    )
    store = convert(file, tmp_path / "store", expert_bits=32, dense_bits=16)
    prompt = torch.arange(3, 40)[None]
    with fate.load(store, experts=1, on_plan=lambda plan, system: None) as model, torch.no_grad():
        got, expected = model(prompt).logits.float(), reference(prompt).logits
        assert model.dtype is (torch.bfloat16 if quantized else torch.float32)
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < (0.05 if quantized else 2e-5)  # quantized weights are kept, and computed, in bfloat16
    assert expected.std() > 0.1


def test_what_is_no_gguf_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUG" + bytes(64))
    with pytest.raises(CheckpointError, match=r"bad\.gguf is not a GGUF file"):
        convert(tmp_path / "bad.gguf", tmp_path / "store")
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_tensor("output.weight", np.zeros((4, 4), np.float32))
    _close(writer)
    with pytest.raises(UnsupportedModelError, match=r"'llama'.*qwen3moe"):
        convert(tmp_path / "llama.gguf", tmp_path / "store")


def _write(file: Path, quantized: bool) -> Path:
    """A tiny Qwen3-MoE as llama.cpp writes it."""
    model = tiny_model("qwen3_moe", **SIZES)
    config: Any = model.config
    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1)):
                _add(writer, f"blk.{layer}.ffn_{part}_exps.weight", half, quantized)
        elif name.endswith("experts.down_proj"):
            _add(writer, f"blk.{name.split('.')[2]}.ffn_down_exps.weight", tensor, quantized)
        else:
            stem, _, end = name.rpartition(".")
            _add(writer, f"{names.get_name(stem)}.{end}", tensor, quantized)
    _close(writer)
    return file


def _add(writer: Any, name: str, tensor: torch.Tensor, quantized: bool) -> None:
    values = tensor.float().contiguous().numpy()
    if not quantized or values.ndim == 1 or "ffn_gate_inp" in name:
        writer.add_tensor(name, values)
        return
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
