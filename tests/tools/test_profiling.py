"""A machine's profile: arithmetic, what is believed and what not, how it is kept, and one measured on a tiny model."""

import json
import math
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fate
from fate import fileio
from fate.cache import ALLOCATIONS, SlotRequest
from fate.core import Precision
from fate.errors import UsageError
from fate.plan.profile import LayerProfile, Machine, Profile, lost_s, read_profile, why_stale, write_profile
from fate.store.reader import StoreReader
from fate.tools.profiling import layer_seconds, measure
from fate.trace.timeline import Event
from tiny import tiny_store

FAMILY, EXPERTS, TOP_K = "qwen2_moe", 8, 3

FIRST = LayerProfile((1.0, 4.0, 10.0), 0.5, 1000, 0.3, 600, recall=0.25, misses=(2.0, 1.0, 0.5))
SECOND = LayerProfile((2.0, 4.0, 3.0), 0.5, 1000, None, None, recall=None, misses=(2.0, 1.5, 0.0))
PROFILE = Profile("f00d", Machine("Z80", 1, "reference", "1"), (1, 4, 16), 2000.0, (FIRST, SECOND))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FATE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path):
    """A directory with a store's expert file in it, for what does not read it."""
    path = tmp_path / "store"
    path.mkdir()
    (path / "experts.fate").write_bytes(b"")
    return path


@pytest.fixture(scope="module")
def header():
    reader = StoreReader(tiny_store(FAMILY))
    reader.close()
    return reader.header


@pytest.fixture
def valid(store, header):
    """A profile that holds for `store` and `header` on this machine."""
    layer = replace(FIRST, misses=(3.0,) * EXPERTS + (0.0,))
    layers = (layer,) * len(header.layers)
    return replace(PROFILE, fingerprint=header.fingerprint, machine=Machine.current(store), layers=layers)


# Arithmetic


@pytest.mark.parametrize("tokens, seconds", [(1, 1.0), (2, 2.0), (4, 4.0), (10, 7.0), (16, 10.0), (32, 18.0)])
def test_compute_lies_on_straight_lines_between_what_was_measured_and_beyond(tokens, seconds):
    assert PROFILE.timing().compute_s(0, tokens) == pytest.approx(seconds)


def test_beyond_the_last_a_fall_is_taken_for_noise():
    assert PROFILE.timing().compute_s(1, 160) == 3.0
    assert PROFILE.timing().compute_s(1, 10) == 3.5


def test_one_measured_number_of_tokens_stands_for_all():
    alone = Profile("f00d", PROFILE.machine, (8,), 1.0, (replace(FIRST, compute_s=(5.0,)),))
    assert [alone.timing().compute_s(0, tokens) for tokens in (1, 8, 80)] == [5.0] * 3


def test_a_transfer_takes_what_was_measured_or_its_bytes_over_an_emulated_link():
    disk, link = PROFILE.timing(), PROFILE.timing(100.0)
    assert [disk.transfer_s(0, p) for p in (Precision.FULL, Precision.INT2)] == [0.5, 0.3]
    assert [link.transfer_s(0, p) for p in (Precision.FULL, Precision.INT2)] == [10.0, 6.0]
    assert [timing.transfer_s(1, Precision.INT2) for timing in (disk, link)] == [0.5, 10.0]


def test_costs_are_misses_less_what_the_gate_hides_in_the_lead():
    costs = PROFILE.costs()
    # Layer 0: foretold from layer 1, whose 2 s hide all that is named; 0.9 of a hidden second is won.
    assert costs[0] == pytest.approx([m * 0.5 - 0.9 * 0.25 * m * 0.5 for m in FIRST.misses])
    assert costs[1] == pytest.approx([m * 0.5 for m in SECOND.misses])  # its gate was not asked
    # At 100 B/s a read takes 10 s, and the lead of 2 s is there but once.
    assert PROFILE.costs(100.0)[0] == pytest.approx(
        [m * 10 - 0.9 * 0.25 * min(m, 1.0) * 2.0 for m in FIRST.misses],
    )


SHARES, TIMES = st.floats(0, 1), st.floats(1e-6, 10)


@given(st.floats(0, 50), st.floats(0, 50), TIMES, TIMES, SHARES)
def test_more_misses_never_cost_less_and_never_more_than_all_their_reads(a, b, transfer_s, lead_s, recall):
    fewer, more = (lost_s(misses, transfer_s, lead_s, recall) for misses in sorted((a, b)))
    assert 0 <= fewer <= more + 1e-9
    assert more <= max(a, b) * transfer_s


def test_an_allocation_takes_the_costs():
    shares = ALLOCATIONS.get("measured")(SlotRequest([2, 2], slots=3, floor=0, costs=PROFILE.costs()))
    assert shares == [1, 2]  # the second layer's gate hides nothing


# What is believed


def test_what_was_written_is_read(store, header, valid):
    assert write_profile(valid, store) == store / "profile.json"
    reading = read_profile(store, header)
    assert (reading.profile, reading.path, reading.why_not) == (valid, store / "profile.json", "")


def test_none_yet(store, header):
    reading = read_profile(store, header)
    assert (reading.profile, reading.path, reading.why_not) == (None, None, "there is none yet")


@pytest.mark.parametrize("field, value", [("processor", "6502"), ("threads", 99), ("kernels", "none"), ("disk", "0")])
def test_another_machine(store, header, valid, field, value):
    write_profile(replace(valid, machine=replace(valid.machine, **{field: value})), store)
    reading = read_profile(store, header)
    assert reading.profile is None
    assert reading.why_not.startswith("it is of another machine (")
    assert f"{value}" in reading.why_not


def test_another_store(store, header, valid):
    write_profile(replace(valid, fingerprint="f00d"), store)
    assert read_profile(store, header).why_not == "it is of another store"


def test_other_layers(store, header, valid):
    assert "other layers" in why_stale(replace(valid, layers=valid.layers[:-1]), header, valid.machine)
    assert "other layers" in why_stale(replace(valid, layers=(FIRST,) * len(header.layers)), header, valid.machine)
    assert why_stale(valid, header, valid.machine) == ""


def test_another_version(store, header, valid):
    write_profile(valid, store)
    file = store / "profile.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 2'))
    assert read_profile(store, header).why_not == "it is of version 2, not 1"


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(raw):
        at = raw
        for name in path:
            at = at[name]
        at[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("layers", 0, "compute_s", [1.0, 2.0]),
        _set("layers", 0, "compute_s", [1.0, math.nan, 2.0]),
        _set("layers", 0, "compute_s", [1.0, "2", 3.0]),
        _set("layers", 0, "compute_s", 1.0),
        _set("layers", 0, "full_s", 0),
        _set("layers", 0, "full_s", True),
        _set("layers", 0, "int2_s", None),
        _set("layers", 0, "recall", 1.5),
        _set("layers", 0, "misses", [1.0] * EXPERTS + [2.0]),
        _set("layers", 0, "surprise", 1),
        _set("layers", 0, None),
        _set("layers", []),
        _set("tokens", [4, 1, 16]),
        _set("tokens", [1, 4.0, 16]),
        _set("link_bytes_per_s", -1),
        _set("machine", "mine"),
        _set("surprise", 1),
    ],
)
def test_damaged_values(store, header, valid, change):
    raw = valid.to_json()
    raw = json.loads(json.dumps(raw))
    change(raw)
    (store / "profile.json").write_text(json.dumps(raw))
    reading = read_profile(store, header)
    assert (reading.profile, reading.why_not) == (None, "it is damaged")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", "[" * 100_000, '{"version": 1}'])
def test_what_is_no_profile(store, header, text):
    (store / "profile.json").write_text(text)
    assert read_profile(store, header).why_not == "it is damaged"


def test_what_is_no_text(store, header):
    (store / "profile.json").write_bytes(b"\xff\xfe\x00")
    assert read_profile(store, header).why_not.startswith("it cannot be read (")


# How it is kept


def test_a_write_that_fails_leaves_the_old_profile_and_nothing_else(store, header, valid, monkeypatch):
    write_profile(valid, store)

    def refuse(source, target):
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(fileio.os, "replace", refuse)
        with pytest.raises(OSError, match="no"):
            write_profile(replace(valid, link_bytes_per_s=1.0), store)
    assert read_profile(store, header).profile == valid
    assert sorted(os.listdir(store)) == ["experts.fate", "profile.json"]


def test_a_store_that_cannot_be_written_has_its_profile_in_the_cache(store, header, valid, tmp_path, monkeypatch):
    real = fileio.tempfile.NamedTemporaryFile

    def read_only(*args, **kwargs):
        if kwargs["dir"] == store:
            raise PermissionError(13, "denied")
        return real(*args, **kwargs)

    monkeypatch.setattr(fileio.tempfile, "NamedTemporaryFile", read_only)
    path = write_profile(valid, store)
    assert path == tmp_path / "cache" / "profiles" / f"{header.fingerprint}.json"
    assert read_profile(store, header).profile == valid


def test_the_cache_is_asked_where_the_profile_beside_the_store_is_of_another_machine(store, header, valid, tmp_path):
    elsewhere = replace(valid, machine=replace(valid.machine, processor="6502"))
    cached = write_profile(valid, store).rename(tmp_path / "mine.json")
    (tmp_path / "cache" / "profiles").mkdir(parents=True)
    write_profile(elsewhere, store)
    assert "6502" in read_profile(store, header).why_not
    cached.rename(tmp_path / "cache" / "profiles" / f"{header.fingerprint}.json")
    assert read_profile(store, header).profile == valid


# Measuring


def test_a_layer_lasts_from_its_routing_to_the_next_without_its_stalls():
    events = [
        Event(9.5, 11.0, "demand", 0, 3, 10),
        Event(10.5, 11.0, "stall", 0),
        Event(10.0, 12.0, "layer", 0),  # 1.5 s of work, then 1 s to the next
        Event(13.0, 14.0, "layer", 1),  # 1 s of work, then 3 s to the next
        Event(17.25, 17.5, "stall", 2),
        Event(17.75, 18.0, "stall", 2),
        Event(17.0, 18.0, "layer", 2),  # 0.5 s of work, then what is usual
    ]
    assert layer_seconds(events, 10.0) == [2.5, 4.0, 2.5]
    assert layer_seconds([Event(1.0, 3.0, "layer", 0), Event(1.0, 2.0, "stall", 0)], 7.0) == [6.0]


@pytest.fixture(scope="module")
def measured():
    """(profile, what it was told it does) of a tiny model that caches a quarter of its experts."""
    said = []
    ids = torch.randint(0, 256, (80,), generator=torch.Generator().manual_seed(5))
    limits = {"experts": "50%", "max_context": 96, "on_plan": lambda *_: None}
    with fate.load(tiny_store(FAMILY), system="load-on-demand", **limits) as model:
        return measure(model, ids, said.append), said


def test_what_is_measured_is_plausible(measured, header):
    profile, said = measured
    assert said == ["reading experts", "computing layers", "following a text"]
    assert profile.tokens == (1, 4, 16, 64, 96)
    assert why_stale(profile, header, Machine.current(tiny_store(FAMILY))) == ""
    assert 1e6 < profile.link_bytes_per_s < 1e12
    for at, layer in enumerate(profile.layers):
        layout = header.layout(at)
        assert all(1e-6 < seconds < 10 for seconds in (*layer.compute_s, layer.full_s, layer.int2_s))
        assert layer.full_bytes == layout.record_bytes
        assert layer.int2_bytes == layout.span(None, Precision.INT2)[1]
        assert 0 <= layer.recall <= 1
        assert layer.misses[0] == pytest.approx(TOP_K)  # nothing cached: all that a token uses
        assert layer.misses[EXPERTS] == 0
        assert layer.misses[0] > layer.misses[EXPERTS // 2] > 0
    most = [sum(layer.compute_s[at] for layer in profile.layers) for at in (0, -1)]
    assert most[0] < 2 * most[1]


def test_the_engine_comes_back_as_it_was():
    limits = {"experts": 12, "max_context": 32, "link": "50MB/s", "on_plan": lambda *_: None}
    with fate.load(tiny_store(FAMILY), system="cross-layer", **limits) as model:
        model.fate.set_link(60e6)
        slots = model.fate.plan.num_slots
        profile = measure(model)
        assert profile.tokens == (1, 4, 16, 32)
        assert model.fate.system.name == "cross-layer"
        assert model.fate.plan.num_slots == slots
        assert model.fate.plan.needs.records > 0
        assert model.fate.pace == 60e6
        assert model.fate.stats().total.forwards == 0
        model(torch.zeros(1, 4, dtype=torch.long))
        assert model.fate.stats().total.bytes_moved > 0


def test_all_resident_stays_all_resident():
    with fate.load(tiny_store("mixtral"), max_context=16, on_plan=lambda *_: None) as model:
        plan = model.fate.plan
        assert plan.num_slots == plan.needs.max_slots
        profile = measure(model, torch.arange(16))
        assert model.fate.plan.num_slots == plan.num_slots
    assert all(layer.recall is not None for layer in profile.layers)


def test_a_store_without_int2():
    with fate.load(tiny_store("mixtral", expert_bits=32), max_context=16, on_plan=lambda *_: None) as model:
        profile = measure(model, torch.arange(16))
    assert {(layer.int2_s, layer.int2_bytes) for layer in profile.layers} == {(None, None)}


def test_a_text_without_tokens_is_refused():
    with fate.load(tiny_store("mixtral"), max_context=16, on_plan=lambda *_: None) as model:
        with pytest.raises(UsageError, match="give a longer text"):
            measure(model, torch.zeros(0, dtype=torch.long))
        model(torch.zeros(1, 4, dtype=torch.long))
