"""Synthetic checkpoints: what transformers loads and `convert` takes, in the hub's layout and in bounded memory."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import fate
from fate.convert import convert
from fate.errors import DiskFullError, OutputExistsError, UnknownNameError, UsageError
from fate.tools.synth.checkpoint import synth_checkpoint
from fate.tools.synth.routing import EMBEDDING_STD, STD
from fate.tools.synth.store import MODELS, synth
from tiny import FAMILIES

INDEX = "model.safetensors.index.json"


@pytest.fixture(params=["qwen2_moe", "deepseek_v3"])
def tiny_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    settings = {**FAMILIES[request.param], "vocab_size": 9600, "rope_parameters": {"rope_theta": 10000.0}}
    monkeypatch.setattr("fate.tools.synth.store.POOL_BYTES", 1 << 23)  # tiny matrices need no more
    monkeypatch.setitem(MODELS, "tiny", {"model_type": request.param, **settings})
    return "tiny"


def _weight_map(path: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
    return weight_map


def test_transformers_loads_it_without_a_word(tiny_name: str, tmp_path: Path) -> None:
    path = synth_checkpoint(tiny_name, tmp_path / "out", routing="uniform", shard_bytes=300_000)
    model, told = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    state = model.state_dict()
    experts = next(state[name] for name in state if name.endswith("experts.gate_up_proj"))
    assert experts.float().std() == pytest.approx(STD, rel=0.03)
    assert len({tuple(expert.flatten()[:8].tolist()) for expert in experts}) == len(experts)
    assert state["model.embed_tokens.weight"].float().std() == pytest.approx(EMBEDDING_STD, rel=0.03)
    assert len(AutoTokenizer.from_pretrained(path)("Once upon a time")["input_ids"]) == 8


def test_experts_are_apart_and_shards_keep_to_their_size(tiny_name: str, tmp_path: Path) -> None:
    path = synth_checkpoint(tiny_name, tmp_path / "out", num_layers=2, shard_bytes=300_000)
    weight_map = _weight_map(path)
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in weight_map
    files = sorted(set(weight_map.values()))
    assert files == sorted(file.name for file in path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    total = 0
    for name in files:
        with safe_open(path / name, framework="pt") as file:
            assert set(file.keys()) == {key for key in weight_map if weight_map[key] == name}
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118 - not a mapping
        assert sum(sizes) <= 300_000 or len(sizes) == 1
        total += sum(sizes)
    assert total == json.loads((path / INDEX).read_text())["metadata"]["total_size"]


def test_it_converts_and_its_store_has_the_shapes_of_a_synthetic_one(tiny_name: str, tmp_path: Path) -> None:
    source = synth_checkpoint(tiny_name, tmp_path / "source")
    store = convert(source, tmp_path / "converted", dense_bits=4)
    direct = synth(tiny_name, tmp_path / "direct", dense_bits=4)
    assert (store / "experts.fate").stat().st_size == (direct / "experts.fate").stat().st_size
    with fate.load(store, experts="50%", max_context=32, on_plan=lambda *_: None) as model:
        assert model(torch.tensor([[5, 300, 7]])).logits.isfinite().all()


def test_the_same_seed_gives_the_same_weights(tiny_name: str, tmp_path: Path) -> None:
    def experts(seed: int) -> bytes:
        return (
            (synth_checkpoint(tiny_name, tmp_path / "out", seed).rename(tmp_path / f"{os.urandom(4).hex()}"))
            .joinpath("model-00001-of-00001.safetensors")
            .read_bytes()
        )

    first = experts(3)
    assert first == experts(3)
    assert first != experts(4)


def test_progress_ends_at_the_whole(tiny_name: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    synth_checkpoint(tiny_name, tmp_path / "out", progress=lambda done, total, what: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_full_disk_leaves_nothing(tiny_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("fate.tools.synth.checkpoint.os.pwrite", full)
    with pytest.raises(DiskFullError):
        synth_checkpoint(tiny_name, tmp_path / "out")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError):
        synth_checkpoint("gpt-5", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError):
        synth_checkpoint("qwen1.5-moe-a2.7b", tmp_path / "out")
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(UsageError, match=r"new\.partial is in the way"):
        synth_checkpoint("qwen1.5-moe-a2.7b", tmp_path / "new")


_MEASURED = """
import sys
from pathlib import Path
from fate.tools.synth.checkpoint import synth_checkpoint

synth_checkpoint("qwen1.5-moe-a2.7b", Path(sys.argv[1]), num_layers=int(sys.argv[2]))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = {}
    for layers in (1, 4):
        script = [sys.executable, "-c", _MEASURED, str(tmp_path / f"{layers}"), str(layers)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(script, env=environment, check=True, stdout=subprocess.PIPE)
        peaks[layers] = int(done.stdout) * 1024
    assert peaks[4] - peaks[1] < 128 * 1024**2, "three more layers are over 3 GB"
    assert peaks[4] < 1024**3
