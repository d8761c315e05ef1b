"""The machine's compute, rho, bounds and the disk's speed."""

from __future__ import annotations

import pytest

from fate.bench.limits import Compute, bound_s, compute_limit, disk_bytes_per_s
from fate.bench.passes import Pass
from fate.core import StepStats
from fate.engine.session import RunStats
from fate.store.reader import StoreReader
from tiny import tiny_store


def one(ttft_s: float, decode_s: float, stall_s: float = 0.0, read: int = 0) -> Pass:
    stats = StepStats(stall_s=stall_s, demand_bytes=read)
    return Pass(prompt_tokens=10, new_tokens=4, ttft_s=ttft_s, decode_s=decode_s, stats=RunStats(stats, stats))


def test_compute_is_the_median_repeat_a_token() -> None:
    repeats = [[one(1.0, 2.0), one(3.0, 2.0)], [one(9.0, 9.0), one(9.0, 9.0)], [one(1.0, 1.0), one(1.0, 1.0)]]
    found = compute_limit(repeats, moe_layers=5, record_bytes=100)
    assert found == Compute(4.0 / 20, 4.0 / 8, 0.5 / 5, 100, resident=True)


def test_where_not_all_fits_stalls_are_taken_off() -> None:
    found = compute_limit([[one(3.0, 2.0, stall_s=1.0, read=1)]], moe_layers=1, record_bytes=1)
    assert (found.prefill_s_per_token, found.decode_s_per_token) == (0.2, 0.25)
    assert not found.resident


def test_rho_is_an_experts_transfer_over_a_layers_compute() -> None:
    compute = Compute(0.0, 0.0, layer_s=0.002, record_bytes=4_000_000, resident=True)
    assert compute.rho(4e9) == pytest.approx(0.5)
    assert compute.bytes_per_s(0.5) == pytest.approx(4e9)


def test_bound() -> None:
    assert bound_s(2.0, 1e9, 1e9) == 2.0
    assert bound_s(2.0, 3e9, 1e9) == 3.0


def test_the_disk_is_measured_with_the_stores_own_records() -> None:
    reader = StoreReader(tiny_store("qwen2_moe"))
    reads: list[tuple[tuple[int, int], int]] = []
    real = reader.read_into

    def read_into(key, buffer, offset):
        reads.append((tuple(key), len(buffer)))
        real(key, buffer, offset)

    reader.read_into = read_into
    assert disk_bytes_per_s(reader) > 1e6
    reader.close()
    size = reader.header.layout(0).record_bytes
    assert sorted(reads) == sorted([((layer, e), size) for layer in range(3) for e in range(8)] * 2)
