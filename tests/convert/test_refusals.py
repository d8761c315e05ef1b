"""Checkpoints and requests that `convert` refuses: a typed error of one line, and nothing that looks like a store."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fate.convert import convert
from fate.errors import (
    CheckpointError,
    FateError,
    ModelNotFoundError,
    NotMoEError,
    UnsupportedModelError,
    UsageError,
)
from tiny import tiny_checkpoint


def _copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "source"))


def _without(name: str) -> Callable[[Path], None]:
    return lambda source: (source / name).unlink()


def _shard(source: Path) -> Path:
    return sorted(source.glob("model-*.safetensors"))[1]


def _truncate(source: Path) -> None:
    os.truncate(_shard(source), _shard(source).stat().st_size - 10)


def _corrupt_header(source: Path) -> None:
    with _shard(source).open("r+b") as file:
        file.seek(8)
        file.write(b"{{{{")


def _only_bin(source: Path) -> None:
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")


def _edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def _drop_tensor(source: Path) -> None:
    shard, index = _shard(source), source / "model.safetensors.index.json"
    tensors = load_file(shard)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, shard, {"format": "pt"})
    listed = json.loads(index.read_text())
    del listed["weight_map"][gone]
    index.write_text(json.dumps(listed))


def _poison(source: Path) -> None:
    tensors = load_file(_shard(source))
    name = next(key for key in sorted(tensors) if ".experts." in key)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, _shard(source), {"format": "pt"})


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (lambda source: _shard(source).unlink(), CheckpointError, r"lacks model-00002.*shards missing"),
        (_truncate, CheckpointError, "model-00002.*cut short"),
        (_corrupt_header, CheckpointError, "model-00002.*corrupt header"),
        (_without("config.json"), ModelNotFoundError, "no config.json"),
        (_only_bin, ModelNotFoundError, r"only \*.bin"),
        (_drop_tensor, CheckpointError, "download it again"),
        (_edit_config(vocab_size=300), CheckpointError, r"lm_head.weight has shape .*300"),
        (_edit_config(moe_intermediate_size=64), CheckpointError, r"config.json are of different models"),
        (_edit_config(num_experts=9), CheckpointError, r"mlp.gate.weight has shape .* says \[9, 64\]"),
        (_edit_config(num_hidden_layers=4, layer_types=None), CheckpointError, r"tensors are missing"),
        (_edit_config(num_hidden_layers=4), CheckpointError, r"not a valid config.*layer_types"),
        (_edit_config(quantization_config={"quant_method": "aqlm"}), UnsupportedModelError, "'aqlm'"),
        (_edit_config(model_type="unheard_of"), UnsupportedModelError, "'unheard_of'"),
        (_poison, CheckpointError, r"experts expert \d+.*NaN"),
    ],
)
def test_bad_sources_are_refused_in_one_line(damage, error: type[FateError], message: str, tmp_path: Path) -> None:
    source = _copy(tiny_checkpoint("qwen2_moe"), tmp_path)
    damage(source)
    with pytest.raises(error, match=message) as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_refused_source_leaves_nothing_behind(tmp_path: Path) -> None:
    source = _copy(tiny_checkpoint("qwen2_moe"), tmp_path)
    _drop_tensor(source)
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_dense_model_and_a_store_are_not_sources(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=99
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(NotMoEError, match="'llama'"):
        convert(tmp_path / "dense", tmp_path / "out")
    store = convert(tiny_checkpoint("mixtral"), tmp_path / "store")
    with pytest.raises(UnsupportedModelError, match="store already"):
        convert(store, tmp_path / "out")


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expert_bits=3.*\(4, 16, 32\)"):
        convert(tiny_checkpoint("mixtral"), tmp_path / "out", expert_bits=3)
    with pytest.raises(UsageError, match=r"float32: choose 4 or 32"):
        convert(tiny_checkpoint("mixtral"), tmp_path / "out", expert_bits=16)
    with pytest.raises(ModelNotFoundError, match="nowhere/at-all"):
        convert("nowhere/at-all", tmp_path / "out")
