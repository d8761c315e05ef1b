"""`bench.kernels`: what a row counts, and that its bound and error are the machine's and the kernel's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fate.bench import kernels as bench
from fate.bench.kernel_shapes import SHAPES, Linear, ModelShape, known_shapes, store_shape
from fate.errors import UnknownNameError
from tiny import tiny_store

SMALL = ModelShape("small", 128, 64, 6, 2, (Linear("gate", 192, 128), Linear("head", 256, 128, once=True)))


@pytest.fixture(autouse=True)
def little_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fate.tools.synth.store.POOL_BYTES", 1 << 22)


@pytest.fixture
def document(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(bench, "COLD_BYTES", 1 << 16)
    monkeypatch.setattr(bench, "LEAST_S", 1e-4)
    limits = iter((bench.Limits(1e9, 4e9), bench.Limits(2e9, 3e9)))
    monkeypatch.setattr(bench, "machine_limits", lambda: next(limits))
    return bench.measure_kernels([SMALL], (1, 40), repeats=3)


def row(document: dict[str, Any], **wanted: object) -> dict[str, Any]:
    (found,) = (r for r in document["shapes"]["small"] if all(r[key] == value for key, value in wanted.items()))
    return found


def test_a_row_for_every_kernel_depth_and_number_of_tokens(document: dict[str, Any]) -> None:
    rows = [(r["kernel"], r["matrices"].split()[0], r["precision"], r["tokens"]) for r in document["shapes"]["small"]]
    linears = [("linear", "gate", depth, tokens) for depth in ("INT4", "INT8") for tokens in (1, 40)]
    heads = [("linear", "head", depth, 1) for depth in ("INT4", "INT8")]
    experts = [("experts", "6", depth, tokens) for depth in ("INT4", "INT2", "INT8") for tokens in (1, 40)]
    assert rows == [*linears, *heads, *experts]


def test_bytes_are_those_of_the_experts_used(document: dict[str, Any]) -> None:
    weights = 3 * 64 * 128
    one = row(document, kernel="experts", precision="INT4", tokens=1)
    assert one["weight_bytes"] == pytest.approx(2 * weights * 4.5 / 8, rel=0.01)
    assert one["operations"] == 2 * 2 * weights
    coarse = row(document, kernel="experts", precision="INT2", tokens=1)
    assert coarse["weight_bytes"] == pytest.approx(2 * weights * 2.5 / 8, rel=0.01)
    many = row(document, kernel="experts", precision="INT4", tokens=40)
    assert many["weight_bytes"] == pytest.approx(6 * weights * 4.5 / 8, rel=0.01)
    assert many["operations"] == 40 * one["operations"]


def test_the_bound_is_of_the_best_limits_seen(document: dict[str, Any]) -> None:
    assert document["limits"] == {"read_bytes_per_s": 2e9, "int8_ops_per_s": 4e9}
    for found in document["shapes"]["small"]:
        bound = max(found["weight_bytes"] / 2e9, found["operations"] / 4e9)
        assert found["share_of_bound"] == pytest.approx(bound / found["seconds"])
        assert found["gb_per_s"] == pytest.approx(found["weight_bytes"] / found["seconds"] / 1e9)


def test_errors_are_the_kernels_and_would_show(document: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(0 < found["relative_error"] < 0.02 for found in document["shapes"]["small"])
    monkeypatch.setattr(bench, "machine_limits", lambda: bench.Limits(1e9, 1e9))
    real = bench.kernels.linear
    monkeypatch.setattr(bench.kernels, "linear", lambda *args: 1.1 * real(*args))
    wrong = bench.measure_kernels([SMALL], (1,), repeats=1)
    assert row(wrong, kernel="linear", precision="INT8", matrices="gate [192, 128]")["relative_error"] > 0.09


def test_a_token_alone_reads_other_experts_in_every_turn() -> None:
    layout = SMALL.expert_layout("int4")
    noise = bench.Noise(0)
    pool = torch.cat([noise.record(layout, item) for item in range(6)])
    depth = bench.DEPTHS["INT4"][1]
    calls = [bench.ExpertCall(layout, pool, SMALL, 6, 1, depth, noise, turn) for turn in range(3)]
    assert {offset for call in calls for offset in call.offsets} == {e * layout.record_bytes for e in range(6)}


def test_limits_are_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "GEMM_SIZE", 64)
    monkeypatch.setattr(bench, "LEAST_S", 1e-4)
    monkeypatch.setattr(bench, "memory_read_gb_per_s", lambda: 20.0)
    limits = bench.machine_limits()
    assert limits.read_bytes_per_s == 20e9
    assert 1e6 < limits.int8_ops_per_s < 1e15


def test_shapes_by_name_and_of_a_store() -> None:
    assert known_shapes(["olmoe-1b-7b"]) == [SHAPES["olmoe-1b-7b"]]
    with pytest.raises(UnknownNameError, match="unknown shape 'gpt-5': choose one of deepseek-moe-16b, "):
        known_shapes(["gpt-5"])
    shape = store_shape(tiny_store("qwen2_moe"))
    assert (shape.hidden, shape.intermediate, shape.num_experts, shape.num_experts_per_tok) == (64, 48, 8, 3)
    assert ("lm_head", 259, 64, True) in [(x.name, x.rows, x.cols, x.once) for x in shape.linears]
