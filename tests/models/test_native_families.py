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
