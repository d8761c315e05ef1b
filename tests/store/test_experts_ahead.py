"""Experts read ahead: the same bytes in the slots, a warm cache, the same text, and no thread left."""

from __future__ import annotations

import copy
import mmap
import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

import fate
from cli_support import FAMILY, flip
from fate.core import ExpertKey
from fate.loading import read_ahead
from fate.store.ahead import DenseWeights
from fate.store.experts_ahead import ExpertsAhead
from fate.store.files import DENSE_FILE, EXPERTS_FILE
from fate.store.reader import StoreReader
from tiny import tiny_store

ALL = 1 << 40


@pytest.fixture
def store() -> Path:
    return tiny_store(FAMILY)


def read_all(store: Path, max_bytes: int = ALL, max_experts: str | int | None = None) -> ExpertsAhead:
    """One whose thread has ended by itself."""
    experts = ExpertsAhead(store, max_bytes, max_experts)
    with DenseWeights(store) as dense:
        experts.start(after=dense)
        assert experts._thread is not None
        experts._thread.join(30)
    return experts


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "fate-experts-ahead"]


def test_slots_hold_the_records_of_all_layers_alike(store: Path) -> None:
    reader = StoreReader(store)
    header, slot = reader.header, reader.header.max_record_bytes
    memory, keys = read_all(store).take(header.num_records * slot)
    assert memory is not None
    assert len(keys) == header.num_records
    assert keys[: len(header.layers)] == [ExpertKey(layer, 0) for layer in range(len(header.layers))]
    for at, key in enumerate(keys):
        expected = memoryview(mmap.mmap(-1, header.layout(key.layer).record_bytes))
        reader.read_into(key, expected, 0)
        assert memory[at * slot : at * slot + len(expected)] == expected


def test_no_more_than_allowed(store: Path) -> None:
    slot = StoreReader(store).header.max_record_bytes
    experts = read_all(store, 3 * slot + 5)
    assert experts.resident_bytes == 3 * slot
    assert len(experts.take(0)[1]) == 3
    assert len(read_all(store, ALL, 2).take(0)[1]) == 2
    assert read_all(store, slot - 1).take(0) == (None, [])
    assert read_all(store, -slot).take(0) == (None, [])


def test_memory_that_is_too_small_is_not_given(store: Path) -> None:
    assert read_all(store).take(1 << 40) == (None, [])


def test_reading_ends_before_a_damaged_record(store: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(store, tmp_path / "store"))
    header = StoreReader(damaged).header
    key = ExpertKey(1, 1)
    flip(damaged / EXPERTS_FILE, header.record_offset(*key) + header.layout(1).split + 3)
    _, keys = read_all(damaged).take(0)
    assert keys == [*(ExpertKey(layer, 0) for layer in range(len(header.layers))), ExpertKey(0, 1)]
    os.truncate(damaged / EXPERTS_FILE, 10)
    assert read_all(damaged).take(0) == (None, [])


def test_the_same_text_from_a_warm_cache(store: Path) -> None:
    ids = torch.arange(24)[None] % 100
    texts, stats, plans = [], [], []
    for ahead in (False, True):
        with read_ahead(store, None, "50%", slots=ahead) as reading:
            assert reading is not None
            if reading.experts is not None:
                assert reading.experts._thread is not None
                reading.experts._thread.join(30)
            model = fate.load(store, experts="50%", ahead=reading, on_plan=lambda plan, _: plans.append(plan))
        with model:
            texts.append(model.generate(ids, max_new_tokens=8, do_sample=False))
            stats.append(model.fate.stats().prefill)
    assert not readers()
    assert torch.equal(texts[0], texts[1])
    assert stats[0].hits == 0
    assert stats[1].hits > 0
    assert stats[1].demand_bytes < stats[0].demand_bytes
    assert abs(plans[0].needs.runtime - plans[1].needs.runtime) < 32 << 20  # what is read ahead is no other row's


def test_a_plan_with_fewer_slots_gives_the_rest_back(store: Path) -> None:
    experts = read_all(store)
    with DenseWeights(store) as dense:
        model = fate.load(store, experts=12, ahead=fate.loading.ReadAhead(dense, experts))
    with model:
        pool = model.fate.engine.pool
        assert len(pool._map) > pool.num_slots * pool.slot_bytes
        beyond = pool.num_slots * pool.slot_bytes
        assert not any(pool._map[beyond : beyond + 8 * pool.slot_bytes])
        cached = sum(
            model.fate.engine.manager.cache.num_cached(layer) for layer in range(len(model.fate.reader.header.layers))
        )
        assert 0 < cached <= 12


def test_room_is_left_for_dense_weights_that_are_not_packed(store: Path, tmp_path: Path) -> None:
    """They are loaded before the plan's slots are known, when what was read ahead is still all there."""
    large = Path(shutil.copytree(store, tmp_path / "store"))
    with (large / DENSE_FILE).open("ab") as file:
        file.truncate(1 << 30)
    with read_ahead(store, "2GiB") as ahead, read_ahead(large, "2GiB") as less:
        assert ahead is not None
        assert less is not None
        assert ahead.experts is not None
        assert less.experts is not None
        assert less.experts._max_bytes < ahead.experts._max_bytes - (1 << 29)


@pytest.mark.parametrize("system", ["load-on-demand-uncached", "fate-hybrid", "cross-layer-int2", "fate-measured"])
def test_systems_whose_output_or_cache_would_not_bear_it(store: Path, system: str) -> None:
    with read_ahead(store, None, system=system) as ahead:
        assert ahead is not None
        assert ahead.experts is None


def test_ctrl_c_meanwhile_joins_the_thread(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, real = threading.Event(), os.preadv

    def slow(*args: object) -> int:
        if threading.current_thread().name == "fate-experts-ahead":
            started.set()
            time.sleep(0.2)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", slow)

    def interrupted() -> None:
        with read_ahead(store, None):
            assert started.wait(30)
            assert readers()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not readers()


def test_copies(store: Path) -> None:
    experts = read_all(store)
    assert copy.deepcopy(experts) is experts
    assert pickle.loads(pickle.dumps(experts)).take(0) == (None, [])
    experts.close()
