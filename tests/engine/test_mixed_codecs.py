"""A store whose layers have codecs of their own: the same bits at every budget, near the checkpoint, at INT2 too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fate
from engine_support import stepwise_logits
from fate.convert import conversion, convert
from fate.store.format import LayerSpec, MatrixSpec
from fate.store.reader import StoreReader
from fate.systems import System
from tiny import tiny_checkpoint, tiny_model

FAMILY, CODECS = "qwen2_moe", ("int4", "int8", "bf16")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    codecs = iter(CODECS)

    def spec(module: str, num_experts: int, matrices: tuple[MatrixSpec, ...]) -> LayerSpec:
        return LayerSpec(module, num_experts, matrices, next(codecs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "LayerSpec", spec)
        return convert(tiny_checkpoint(FAMILY), tmp_path_factory.mktemp("stores") / "mixed", dense_bits=16)


def logits(store: Path, ids: torch.Tensor, experts: int | str, system: System | str) -> torch.Tensor:
    with fate.load(store, experts=experts, system=system) as model:
        found = stepwise_logits(model, ids)
        assert model.fate.stats().total.evictions > 0 or experts == "100%"
        return found


def test_the_header_says_so(store: Path) -> None:
    reader = StoreReader(store)
    reader.close()
    assert reader.header.codecs == CODECS
    assert reader.file.read_bytes()[8:12] == (3).to_bytes(4, "little")
    assert json.loads((store / "config.json").read_text())["quantization_config"]["format_version"] == 3


def test_the_same_bits_at_every_budget_and_near_the_checkpoint(store: Path, prompt: torch.Tensor) -> None:
    resident = logits(store, prompt, "100%", "load-on-demand")
    for system in ("load-on-demand", "fate"):
        assert torch.equal(logits(store, prompt, 1, system), resident)
    expected = stepwise_logits(tiny_model(FAMILY), prompt)
    assert (resident - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_int2_is_for_the_layers_that_have_it(store: Path, prompt: torch.Tensor) -> None:
    lossy = System("all-int2", precision="int2")
    whole, coarse = logits(store, prompt, "100%", "load-on-demand"), logits(store, prompt, 1, lossy)
    assert torch.equal(coarse, logits(store, prompt, "100%", lossy))
    assert not torch.equal(coarse, whole)
    with fate.load(store, experts=1, system=lossy) as model:
        stepwise_logits(model, prompt)
        layers = [stats.total for stats in model.fate.layer_stats()]
    reader = StoreReader(store)
    reader.close()
    full = [reader.header.layout(layer).record_bytes for layer in range(len(CODECS))]
    assert layers[0].bytes_moved < layers[0].misses * full[0]
    assert [s.bytes_moved for s in layers[1:]] == [s.misses * size for s, size in zip(layers[1:], full[1:])]
