"""Families whose attention is of a known form, at sizes whose matrices are packed. Two native calls a layer give the
bits of their own modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fate
from fate.convert import convert
from fate.kernels import native
from native_support import IDS, PROMPT, Calls, by_modules
from sweep.checkpoints import save_checkpoint
from sweep.discovery import find_family
from sweep.tiny_configs import tiny_config

FAMILIES = ["dots1", "glm4_moe", "mellum", "solar_open"]
pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")


def decoded(model: Any) -> torch.Tensor:
    cache, rows = model.fate.new_cache(model.config), []
    model(IDS[:1, :PROMPT], past_key_values=cache)
    for at in range(PROMPT, PROMPT + 6):
        rows.append(model(IDS[:1, at : at + 1], past_key_values=cache).logits[0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bits_of_a_familys_own_modules(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(find_family(name))
    config.num_key_value_heads = config.num_attention_heads
    config.dtype = "bfloat16"
    calls = Calls(monkeypatch)
    store = convert(save_checkpoint(config, tmp_path / "checkpoint"), tmp_path / "store")
    with fate.load(store, on_plan=lambda *_: None) as model, torch.inference_mode():
        ours = decoded(model)
        assert model.fate.native == "layer"
        assert calls.attention > 0
        with by_modules():
            assert torch.equal(ours, decoded(model))


_WIDE = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "sliding_window": 8,
}
_LATENT = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
    "q_lora_rank": 64,
}
MIXED = {
    "qwen3_next": _WIDE,
    "qwen3_5_moe": _WIDE,
    "gpt_oss": _WIDE,
    "glm4_moe_lite": _LATENT,
    "deepseek_v2": {**_LATENT, "q_lora_rank": None},
    "deepseek_v3": _LATENT,
}


@pytest.fixture(scope="module", params=MIXED)
def mixed_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family with another mixer than plain attention, at sizes whose matrices are packed."""
    folder, config = tmp_path_factory.mktemp(request.param), tiny_config(find_family(request.param))
    text = config.get_text_config()
    for name, value in MIXED[request.param].items():
        if hasattr(text, name):
            setattr(text, name, value)
    return convert(save_checkpoint(config, folder / "checkpoint"), folder / "store")


def logits(model: Any, rows: int, steps: int = 24) -> torch.Tensor:
    """[rows, steps, vocabulary], after a prompt longer than a window."""
    cache, found = model.fate.new_cache(model.config), []
    ids = torch.randint(0, 256, (2, 20 + steps), generator=torch.Generator().manual_seed(0))[:rows]
    model(ids[:, :20], past_key_values=cache)
    for at in range(20, 20 + steps):
        found.append(model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1])
    return torch.stack(found, dim=1)


def test_other_mixers_decode_natively_with_the_bits_of_every_budget_and_batch(
    mixed_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    with fate.load(mixed_store, experts="100%", max_batch=2, on_plan=lambda *_: None) as model, torch.inference_mode():
        ours = logits(model, 1)
        layers = model.config.get_text_config().num_hidden_layers
        assert model.fate.native == "layer"
        assert calls.attention == 24 * layers
        assert torch.equal(logits(model, 2)[:1], ours)
        with by_modules():
            error = (logits(model, 1) - ours).norm(dim=-1) / ours.norm(dim=-1)
        assert error.median() < 0.04  # activations are rounded to int8 at other places
    with fate.load(mixed_store, experts=1, on_plan=lambda *_: None) as model, torch.inference_mode():
        assert torch.equal(logits(model, 1), ours)
        assert model.fate.stats().decode.evictions > 0
