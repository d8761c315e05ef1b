"""Finding experts and routers by transformers' interface, over families."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from fate.errors import NotMoEError, UnsupportedModelError
from fate.models.adapter import build_meta_model, find_moe_layers
from fate.store.format import MatrixSpec
from tiny import FAMILIES, tiny_config

_SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 99,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_come_in_order_with_router_and_shapes(family: str) -> None:
    config = tiny_config(family)
    model = build_meta_model(config)
    layers = find_moe_layers(model)
    first = 1 if family.startswith("deepseek") else 0
    assert [layer.name for layer in layers] == [
        f"model.layers.{index}.mlp.experts" for index in range(first, config.num_hidden_layers)
    ]
    for index, layer in enumerate(layers):
        assert layer.index == index
        assert model.get_submodule(layer.name) is layer.experts
        assert model.get_submodule(layer.block_name) is layer.block
        assert layer.router is layer.block.gate
        assert layer.num_experts == 8
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    assert layers[0].matrices == (
        MatrixSpec("gate_up_proj", 2 * width, config.hidden_size),
        MatrixSpec("down_proj", config.hidden_size, width),
    )
    assert all(parameter.is_meta for parameter in model.parameters())


def test_transposed_interleaved_biased_experts_are_canonical() -> None:
    model = build_meta_model(AutoConfig.for_model("gpt_oss", **_SMALL, num_local_experts=4, num_experts_per_tok=2))
    layer = find_moe_layers(model)[1]
    assert layer.experts.gate_up_proj.shape == (4, 64, 192)
    assert layer.matrices == (MatrixSpec("gate_up_proj", 192, 64), MatrixSpec("down_proj", 64, 96))
    assert layer.router is layer.block.router


def test_ungated_experts() -> None:
    config = AutoConfig.for_model(
        "nemotron_h", **_SMALL, layers_block_type=["attention", "moe"], n_routed_experts=4, moe_intermediate_size=40
    )
    (layer,) = find_moe_layers(build_meta_model(config))
    assert [matrix.name for matrix in layer.matrices] == ["up_proj", "down_proj"]
    assert layer.matrices[0].rows == layer.matrices[1].cols == 40


def test_a_model_whose_expert_weights_are_dropped() -> None:
    model = build_meta_model(tiny_config("mixtral"))
    for layer in find_moe_layers(model):
        layer.experts.gate_up_proj = layer.experts.down_proj = None
    layers = find_moe_layers(model)
    assert [(layer.num_experts, layer.matrices) for layer in layers] == [(8, ())] * 2


def test_meta_model_has_the_dtype_of_its_config() -> None:
    model = build_meta_model(tiny_config("olmoe", dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_dense_models_are_not_moe() -> None:
    config = LlamaConfig(**_SMALL)
    with pytest.raises(NotMoEError, match="'llama'"):
        find_moe_layers(build_meta_model(config))


@pytest.mark.parametrize(
    "family, extra, matrices",
    [
        ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 64}, {"gate_up_proj", "down_proj"}),
        ("jetmoe", {"num_local_experts": 4, "kv_channels": 16}, {"gate_up_proj", "down_proj"}),
        ("doge", {"is_moe": True, "num_experts": 16}, {"up_proj", "down_proj"}),
    ],
)
def test_adapters_give_experts_outside_the_interface_one(family: str, extra: dict[str, int], matrices: set) -> None:
    model = build_meta_model(AutoConfig.for_model(family, **{**_SMALL, **extra}))
    layers = find_moe_layers(model)
    assert len(layers) == 2
    assert {matrix.name for layer in layers for matrix in layer.matrices} == matrices
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_module_list_of_experts_is_named() -> None:
    model = build_meta_model(tiny_config("mixtral"))
    model.model.layers[1].mlp.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
    with pytest.raises(UnsupportedModelError, match=r"model.layers.1.mlp.experts is a ModuleList"):
        find_moe_layers(model)


def test_weights_that_do_not_fit_the_interface_are_named() -> None:
    model = build_meta_model(tiny_config("mixtral"))
    experts = model.model.layers[0].mlp.experts
    experts.extra = nn.Parameter(torch.empty(8, 2, 2, device="meta"))
    with pytest.raises(UnsupportedModelError, match="extra"):
        find_moe_layers(model)
    del experts.extra
    experts.down_proj = nn.Parameter(torch.empty(8, 64, 100, device="meta"))
    with pytest.raises(UnsupportedModelError, match="100 down_proj columns"):
        find_moe_layers(model)


def test_an_unknown_architecture_is_refused_in_one_line() -> None:
    class Unheard(PreTrainedConfig):
        model_type = "unheard"

    with pytest.raises(UnsupportedModelError, match="'unheard'") as caught:
        build_meta_model(Unheard())
    assert "\n" not in str(caught.value)
