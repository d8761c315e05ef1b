"""`fate plan`: a configuration is enough, and what cannot fit ends with exit code 3."""

import shutil

import pytest

from fate.kernels import native
from tiny import tiny_checkpoint, tiny_store

pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")
GIVEN = "--disk-speed", 2, "--memory-speed", 30


def test_a_configuration_alone(cli, tmp_path):
    shutil.copy(tiny_checkpoint("qwen2_moe") / "config.json", tmp_path)
    result = cli("plan", tmp_path, *GIVEN, "--json")
    assert result.code == 0
    found = result.json
    assert {key: found["work"][key] for key in ("layers", "num_experts", "top_k")} == {
        "layers": 3,
        "num_experts": 8,
        "top_k": 3,
    }
    assert not found["exact_download"]
    assert found["download_bytes"] == 4 * found["parameters"]
    assert len(found["budgets"]) == 8
    assert found["budgets"][0][0] == found["smallest"]
    assert found["budgets"][-1][1]["share"] == pytest.approx(1.0)
    assert all(len(line) <= 80 for line in result.out.splitlines()[:-1] if str(tmp_path) not in line)


def test_a_checkpoint_and_the_store_made_of_it(cli):
    checkpoint = cli("plan", tiny_checkpoint("qwen2_moe"), *GIVEN, "--json").json
    store = cli("plan", tiny_store("qwen2_moe"), *GIVEN, "--json").json
    assert checkpoint["exact_download"]
    assert checkpoint["work"]["expert_bytes"] == store["work"]["expert_bytes"]
    assert checkpoint["store_bytes"] == pytest.approx(store["store_bytes"], rel=0.05)


def test_a_larger_budget_holds_more_and_is_faster(cli):
    found = cli("plan", "qwen3.5-35b-a3b", *GIVEN, "--memory", "6GiB", "--memory", "12GiB", "--json").json
    needs, layers, budgets = found["needs"], found["work"]["layers"], found["budgets"]
    assert [size for size, _ in budgets] == [6 * 2**30, 12 * 2**30]
    assert budgets[0][1]["tokens_per_s"][0] < budgets[1][1]["tokens_per_s"][0]
    fixed = sum(needs[name] for name in ("runtime", "dense", "kv_cache", "buffers"))
    transient = needs["min_slots"] - layers  # every layer caches one at least
    for size, at in budgets:
        assert at["share"] == pytest.approx(((size - fixed) / needs["slot"] - transient) / needs["total_experts"])


def test_what_cannot_fit(cli):
    result = cli("plan", "qwen3-30b-a3b", "--memory", "512MiB", *GIVEN)
    assert result.code == 3
    assert "the smallest that does is --memory" in result.err


def test_what_is_no_model(refuse, tmp_path):
    refuse(2, "plan", "/nowhere/at/all", *GIVEN)
    (tmp_path / "model.gguf").touch()
    assert "is a file" in refuse(2, "plan", tmp_path / "model.gguf", *GIVEN)


def test_a_disk_that_is_not_there(refuse):
    assert "is not a directory" in refuse(2, "plan", "qwen3-30b-a3b", "--disk", "/nowhere")
