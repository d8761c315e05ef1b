"""Damage and failure: a typed error reaches the caller, nothing hangs, no thread stays behind."""

import gc
import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch

import fate
from fate.errors import (
    BudgetTooSmallError,
    ChecksumError,
    ClosedError,
    StoreError,
    StoreMismatchError,
    StoreVersionError,
    TransferError,
)
from fate.store.reader import DENSE_FILE, EXPERTS_FILE, PACKED_FILE, StoreReader
from tiny import tiny_store


@pytest.fixture
def damaged(mini_store, tmp_path):
    """A copy of a good store, to be damaged."""
    return shutil.copytree(mini_store, tmp_path / "store")


def is_free(lock):
    """Whether another thread can take it."""
    found = []

    def take():
        found.append(lock.acquire(blocking=False))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return found[0]


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
    with pytest.raises(StoreVersionError, match="format version 99, this fate reads versions 2 and 3"):
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
    def broken(self, key, buffer, offset, progress=None, read_file=None):
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
    real, read_into = os.preadv, StoreReader.read_into

    def plainly(self, key, buffer, offset, progress=None, read_file=None):  # as without the compiled extension
        read_into(self, key, buffer, offset, progress)

    monkeypatch.setattr(StoreReader, "read_into", plainly)
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


def test_interrupted_anywhere_the_next_run_is_right(prompt):
    """SIGALRM raises KeyboardInterrupt at random points of the forward; afterwards every bit is as before."""
    ids, rng = prompt[:, :6], random.Random(0)
    torch.set_num_threads(2)

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with fate.load(tiny_store("qwen2_moe"), experts="40%") as model, torch.inference_mode():
            expected, interrupted = model(ids).logits, 0
            for _ in range(300):
                start = time.perf_counter()
                assert torch.equal(model(ids).logits, expected)
                span = time.perf_counter() - start  # of this moment: a first run, or a busy machine, takes longer
                try:
                    try:
                        signal.setitimer(signal.ITIMER_REAL, rng.random() * span + 1e-5)
                        model(ids)
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
                assert torch.equal(model(ids).logits, expected)
                residency = model.fate.engine.residency
                assert not residency.cache.pinned
                assert is_free(residency.lock)
                assert torch.get_num_threads() == 2
                if interrupted == 30:
                    break
            assert interrupted == 30
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_closed_under_a_running_forward(prompt):
    """The forward ends with ClosedError or with the right bits, never with others."""
    outcomes = set()
    for delay in range(12):
        with fate.load(tiny_store("qwen2_moe"), experts=1) as model, torch.inference_mode():
            expected = model(prompt).logits
            closer = threading.Timer(delay * 1e-3, model.fate.close)
            closer.start()
            for _ in range(200):
                try:
                    assert torch.equal(model(prompt).logits, expected)
                except ClosedError:
                    outcomes.add("closed")
                    break
            closer.join()
    assert outcomes == {"closed"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told(prompt):
    with fate.load(tiny_store("qwen2_moe"), experts=1) as model:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            try:
                model(prompt)
            except TransferError as error:
                os._exit(0 if "transfer threads are gone" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_refused_loads_leave_no_file_open():
    store = tiny_store("qwen2_moe")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(BudgetTooSmallError):
            fate.load(store, memory=1 << 20)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


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
