"""What is packed: large plain matrices, once per tie, and never a router or an expert."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextScaledWordEmbedding
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeScaledWordEmbedding

from fate.kernels.reference import dequantize
from fate.models.adapter import build_meta_model, find_moe_layers
from fate.models.packable import packable, packed_ties
from fate.models.packed import PackedEmbedding
from packed_records import random_record
from sweep.discovery import find_family
from sweep.tiny_configs import tiny_config as family_config
from tiny import FAMILIES, tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_experts_and_small_matrices_stay(family: str) -> None:
    model = build_meta_model(tiny_config(family))
    layers = find_moe_layers(model)
    packed = packable(model, layers)
    assert "model.layers.0.self_attn.o_proj" in packed
    for name, kind in packed.items():
        module = model.get_submodule(name)
        assert type(module) is {"linear": nn.Linear, "embedding": nn.Embedding}[kind]
        assert module.weight.numel() >= 4096
        assert module.weight.shape[0] >= 8
        assert not any(
            name == layer.name or name.startswith((layer.name + ".", layer.block_name + ".gate")) for layer in layers
        )


def test_a_gate_of_one_output_stays() -> None:
    model = build_meta_model(tiny_config("qwen2_moe", hidden_size=8192, num_hidden_layers=1))
    packed = packable(model, find_moe_layers(model))
    assert model.model.layers[0].mlp.shared_expert_gate.weight.numel() >= 4096
    assert "model.layers.0.mlp.shared_expert_gate" not in packed
    assert "model.layers.0.mlp.shared_expert.gate_proj" in packed


def test_a_tied_head_is_packed_once_under_its_source() -> None:
    tied = build_meta_model(tiny_config("qwen3_moe"))
    packed = packable(tied, find_moe_layers(tied))
    assert packed["model.embed_tokens"] == "embedding"
    assert "lm_head" not in packed
    assert packed_ties(tied, packed) == {"lm_head": "model.embed_tokens"}
    apart = build_meta_model(tiny_config("qwen3_moe", tie_word_embeddings=False))
    packed = packable(apart, find_moe_layers(apart))
    assert (packed["model.embed_tokens"], packed["lm_head"]) == ("embedding", "linear")
    assert packed_ties(apart, packed) == {}


def test_a_tie_with_a_subclass_is_not_packed_at_all() -> None:
    class Scaled(nn.Embedding):
        pass

    class Head(nn.Linear):
        pass

    model = build_meta_model(tiny_config("qwen3_moe"))
    embedding = model.model.embed_tokens
    model.model.embed_tokens = Scaled(259, 128, device="meta")
    assert not {"model.embed_tokens", "lm_head"} & set(packable(model, find_moe_layers(model)))
    model.model.embed_tokens, model.lm_head = embedding, Head(128, 259, bias=False, device="meta")
    assert not {"model.embed_tokens", "lm_head"} & set(packable(model, find_moe_layers(model)))


def test_what_the_model_keeps_in_float32_stays() -> None:
    model = build_meta_model(tiny_config("mixtral", dtype=torch.bfloat16))
    layers = find_moe_layers(model)
    assert "model.layers.0.self_attn.q_proj" in packable(model, layers)
    model._keep_in_fp32_modules_strict = {"self_attn.q_proj"}
    packed = packable(model, layers)
    assert "model.layers.0.self_attn.q_proj" not in packed
    assert "model.layers.0.self_attn.o_proj" in packed


@pytest.mark.parametrize("cls", [Gemma4TextScaledWordEmbedding, NllbMoeScaledWordEmbedding])
def test_an_embedding_with_a_scale(cls: type[nn.Embedding]) -> None:
    embedding = cls(300, 64, 0, embed_scale=8.0)
    packed = PackedEmbedding(embedding, "int8", torch.float32)
    packed.packed = random_record(packed.layout)
    table = dequantize(packed.packed, packed.layout, 0)
    embedding.weight.data = table
    ids = torch.tensor([[3, 299, 0]])
    torch.testing.assert_close(packed(ids), embedding(ids))
    torch.testing.assert_close(packed.weight[5, :], table[5])
    torch.testing.assert_close(packed.weight[-1], table[-1])
    torch.testing.assert_close(nn.functional.linear(table[:2], packed.weight), table[:2] @ table.T)
    assert (packed.weight.shape, packed.weight.dtype) == (table.shape, table.dtype)
    with pytest.raises(IndexError):
        packed.weight[300]


def test_an_embedding_with_a_scale_and_the_head_tied_to_it_are_packed() -> None:
    model = build_meta_model(family_config(find_family("gemma4")))
    packed = packable(model, find_moe_layers(model))
    assert packed["model.embed_tokens"] == "embedding"
    assert packed_ties(model, packed) == {"lm_head": "model.embed_tokens"}
