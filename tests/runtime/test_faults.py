"""Damage and failure: a typed error reaches the caller, nothing hangs, no thread stays behind."""

import os
import shutil
import threading

import pytest
import torch

import fate
from fate.core import ExpertKey
from fate.errors import ChecksumError, StoreError, StoreMismatchError, StoreVersionError, TransferError
from fate.store.reader import DENSE_FILE, EXPERTS_FILE, PACKED_FILE, StoreReader
from tiny import tiny_store


@pytest.fixture
def damaged(mini_store, tmp_path):
    """A copy of a good store, to be damaged."""
    return shutil.copytree(mini_store, tmp_path / "store")


def overwrite(file, offset, data):
    with open(file, "r+b") as f:
        f.seek(offset)
        f.write(data)


def flip(file, offset):
    with open(file, "rb") as f:
        f.seek(offset)
        byte = f.read(1)[0]
    overwrite(file, offset, bytes([byte ^ 0x40]))


def generate(model, prompt):
    return model.generate(prompt, max_new_tokens=2, do_sample=False)


def test_a_flipped_byte_in_a_record(damaged, prompt):
    with_reader = StoreReader(damaged)
    header = with_reader.header
    with_reader.close()
    for expert in range(60):
        flip(damaged / EXPERTS_FILE, header.record_offset(5, expert) + 100)
    with fate.load(damaged, experts="25%") as model:
        with pytest.raises(ChecksumError, match=r"layer 5 expert \d+ is damaged .* convert the checkpoint again"):
            generate(model, prompt)
        with pytest.raises(ChecksumError):
            generate(model, prompt)
    assert not [t for t in threading.enumerate() if t.name.startswith("fate-transfer")]


def test_a_flipped_byte_in_the_second_half_is_no_harm_to_int2(damaged, prompt):
    reader = StoreReader(damaged)
    layout = reader.header.layout(5)
    start, length = layout.span(None, layout.precisions[0])
    reader.close()
    for expert in range(60):
        flip(damaged / EXPERTS_FILE, reader.header.record_offset(5, expert) + start + length + 10)
    with fate.load(damaged, experts="25%", system="cross-layer-int2") as model:
        generate(model, prompt)
    with fate.load(damaged, experts="25%") as model, pytest.raises(ChecksumError):
        generate(model, prompt)


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.0])
def test_cut_short(damaged, kept):
    file = damaged / EXPERTS_FILE
    os.truncate(file, int(file.stat().st_size * kept))
    with pytest.raises(StoreError, match=r"cut short|not a Fate store"):
        fate.load(damaged)


def test_cut_short_while_running(damaged, prompt):
    with fate.load(damaged, experts=1) as model:
        os.truncate(damaged / EXPERTS_FILE, 8192)
        with pytest.raises(StoreError, match="ends inside layer 0 expert"):
            generate(model, prompt)


def test_a_damaged_header(damaged):
    flip(damaged / EXPERTS_FILE, 60)
    with pytest.raises(ChecksumError, match="the header is damaged"):
        fate.load(damaged)


def test_another_format_version(damaged):
    overwrite(damaged / EXPERTS_FILE, 8, (99).to_bytes(4, "little"))
    with pytest.raises(StoreVersionError, match="format version 99, this fate reads version 1"):
        fate.load(damaged)


def test_experts_of_another_model(damaged):
    shutil.copy(tiny_store("qwen2_moe", 32, 16) / EXPERTS_FILE, damaged / EXPERTS_FILE)
    with pytest.raises(StoreMismatchError, match="experts of another conversion"):
        fate.load(damaged)


def test_config_of_another_shape(tmp_path):
    store = shutil.copytree(tiny_store("qwen2_moe", 32, 16), tmp_path / "store")
    config = (store / "config.json").read_text().replace('"moe_intermediate_size": 48', '"moe_intermediate_size": 64')
    (store / "config.json").write_text(config)
    with pytest.raises(StoreMismatchError, match=r"does not hold the experts that .*config.json describes"):
        fate.load(store)


@pytest.mark.parametrize("name", [DENSE_FILE, PACKED_FILE])
def test_a_missing_or_truncated_dense_file(damaged, name):
    os.truncate(damaged / name, 5000)
    with pytest.raises(StoreError):
        fate.load(damaged)
    os.remove(damaged / name)
    with pytest.raises(StoreError):
        fate.load(damaged)


@pytest.mark.parametrize("name", [DENSE_FILE, PACKED_FILE])
def test_a_flipped_byte_in_a_dense_weight(damaged, name):
    flip(damaged / name, (damaged / name).stat().st_size // 2)
    with pytest.raises(ChecksumError, match=rf"{name}: model\..* is damaged"):
        fate.load(damaged)


def test_a_config_that_is_no_json(damaged):
    (damaged / "config.json").write_text("{")
    with pytest.raises(StoreError, match=r"config\.json cannot be read"):
        fate.load(damaged)


def test_a_failing_disk(mini_store, prompt, monkeypatch):
    def broken(self, key, buffer, offset):
        raise OSError(5, "Input/output error")

    with fate.load(mini_store, experts="25%") as model:
        good = generate(model, prompt)
        with monkeypatch.context() as patch:
            patch.setattr(StoreReader, "read_into", broken)
            with pytest.raises(TransferError, match=r"reading layer \d+ expert \d+ failed: .*Input/output error"):
                generate(model, prompt.flip(1))
        assert torch.equal(generate(model, prompt), good), "the model recovers when the disk does"


def test_short_reads_are_completed(mini_store, prompt, monkeypatch):
    with fate.load(mini_store, experts="25%") as model:
        expected = generate(model, prompt)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:4096]], at))
    with fate.load(mini_store, experts="25%") as model:
        assert torch.equal(generate(model, prompt), expected)


def test_an_exception_in_the_forward_leaves_no_pins(mini_store, prompt):
    with fate.load(mini_store, experts=1) as model:
        expected = generate(model, prompt)

        def fail(*_):
            raise RuntimeError("planted")

        handle = model.model.layers[3].mlp.experts.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="planted"):
            generate(model, prompt)
        handle.remove()
        assert torch.equal(generate(model, prompt), expected)
        manager = model.model.layers[0].mlp.experts.fate_layer._manager
        keys = [ExpertKey(layer, expert) for layer in range(16) for expert in range(60)]
        assert not any(entry.pins for key in keys if (entry := manager.cache.lookup(key)))


def test_interrupted_in_the_middle_of_a_lease(mini_store, prompt, monkeypatch):
    from fate.transfer.scheduler import TransferScheduler

    with fate.load(mini_store, experts=1) as model:
        expected = generate(model, prompt)
        real = TransferScheduler.wait_any
        calls = iter(range(1000))

        def interrupted(self, transfers):
            if next(calls) == 3:
                raise KeyboardInterrupt
            return real(self, transfers)

        with monkeypatch.context() as patch:
            patch.setattr(TransferScheduler, "wait_any", interrupted)
            with pytest.raises(KeyboardInterrupt):
                generate(model, prompt)
        assert torch.equal(generate(model, prompt), expected)
