"""Fate beside a peer: order, limits, failures and ratios, with a peer of the tests' own; Fate's worker for real."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import comparison as module
from benchmarks.peers.cgroup import MemoryGroup
from benchmarks.peers.comparison import Comparison, Settings, peer_version, run_worker
from benchmarks.peers.gguf_file import GgufFile
from benchmarks.peers.measurement import measure
from benchmarks.peers.summary import document, weight_bytes_per_token
from fate.errors import UsageError
from fate.units import MIB
from tiny import tiny_store

QUICK = Settings(("resident", "1GiB"), (2, 1), 2, (8,), 4, 8, 2, 3)
FILES = [GgufFile(Path("a.q4_1.gguf"), "q4_1", 0.0, 3 << 30), GgufFile(Path("a.q4_0.gguf"), "q4_0", 0.0, 2 << 30)]


class Calls:
    """An engine that remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def reset(self) -> None:
        self.calls.append("reset")

    def set_threads(self, threads: int) -> None:
        self.calls.append(f"{threads} threads")

    def feed(self, ids: Any) -> None:
        self.calls.append(list(ids))

    def write_logits(self, ids: Any, path: str) -> None:
        self.calls.append(path)

    def counters(self) -> dict[str, float]:
        return {"fed": sum(isinstance(call, list) for call in self.calls)}


def job(**changes: Any) -> dict[str, Any]:
    tokens = {"launch_tokens": 2, "prefills": [3, 4], "prompt_tokens": 3, "settle_tokens": 1, "decode_tokens": 2}
    return {**tokens, "ids": list(range(8)), "threads": [2, 1], "started": 0.0, "logits": None, **changes}


def test_both_engines_are_asked_the_same() -> None:
    engine = Calls()
    found = measure(engine, job(logits="file"))
    assert engine.calls[:6] == ["2 threads", [0, 1], "reset", "file", "reset", [0, 1, 2, 3]]
    assert engine.calls[6:18:3] == ["2 threads", "1 threads", "2 threads", "1 threads"]
    assert engine.calls[18:] == [
        *("2 threads", "reset", [0, 1, 2], [3], [4], [5]),
        *("1 threads", "reset", [0, 1, 2], [3], [4], [5]),
    ]
    assert set(found["prefill"]) == {"3", "4"}
    assert set(found["decode"]) == set(found["prefill"]["3"]) == {"2", "1"}
    assert found["counters"] == {"fed": 2}, "of the timed tokens alone"
    assert found["launch_s"] > 0


def fake_run(log: list[Any]) -> Any:
    speeds = {"fate": 8.0, "q4_1": 2.0, "q4_0": 3.0, "q4_0 repacked": 4.0}

    def run(command: list[str], given: dict[str, Any], limit: int | None) -> dict[str, Any]:
        name = "fate" if "repack" not in given else Path(given["model"]).suffixes[0][1:]
        name += " repacked" if given.get("repack") else ""
        log.append((name, limit, list(given["prefills"]), given["threads"]))
        if given["logits"]:
            np.save(given["logits"], np.eye(8, 5) + (0.01 if name == "fate" else 0.0))
        if name == "q4_1" and limit:
            return {"failed": "killed at the memory limit"}
        speed = speeds[name]
        prefill = {str(t): {"2": speed, "1": speed / 2} for t in given["prefills"]}
        return {"launch_s": 8 / speed, "prefill": prefill, "decode": {"2": speed, "1": speed * 1.5}, "system": "CPU"}

    return run


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(module, "run_worker", fake_run(found))
    monkeypatch.setattr(module, "drop_page_cache", lambda files: found.append([file.name for file in files]))
    return found


def compared(log: list[Any]) -> tuple[Comparison, dict[str, Any]]:
    store = tiny_store("qwen2_moe", dense_bits=4)
    comparison = Comparison(store, FILES, "python", list(range(99)), QUICK)
    comparison.run(lambda done, total, what: None)
    return comparison, document(store, FILES, "1.2", QUICK, comparison.results, 1e9)


def test_engines_take_turns_and_limits_are_cold(log: list[Any]) -> None:
    compared(log)
    order = ["fate", "q4_1", "q4_0", "q4_0 repacked"]
    resident = [entry for entry in log if isinstance(entry, tuple) and entry[1] is None]
    assert [entry[0] for entry in resident] == order * 2
    assert {entry[3] for entry in resident if entry[0] != "fate"} == {(2, 1)}
    assert {entry[3] for entry in resident if entry[0] == "fate"} == {(2,)}
    limited = [entry for entry in log if isinstance(entry, tuple) and entry[1] is not None]
    assert [(name, prefills) for name, _, prefills, _ in limited] == [(name, []) for name in order[:3] * 2]
    assert sum("experts.fate" in entry for entry in log if isinstance(entry, list)) == 2
    assert log[log.index(limited[1]) - 1] == ["a.q4_1.gguf"]


def test_the_peers_openmp_is_left_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    run = fake_run([])

    def noted(command: list[str], job: dict[str, Any], limit: int | None) -> dict[str, Any]:
        commands.append(command)
        return run(command, job, limit)

    monkeypatch.setattr(module, "run_worker", noted)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    compared([])
    asked = [*next(command for command in commands if "python" in command)[:-2], "printenv", "OMP_WAIT_POLICY"]
    assert subprocess.run(asked, capture_output=True, text=True).stdout == ""


def test_ratios_are_to_the_peers_best_and_failures_are_told(log: list[Any]) -> None:
    _, found = compared(log)
    rows = {(row["budget"], row["what"]): row for row in found["rows"]}
    assert rows["resident", "decode"]["ratio"] == 12.0 / 6.0
    assert rows["resident", "decode"]["best_peer"] == "q4_0 repacked"
    assert rows["resident", "prefill 8"]["ratio"] == 2.0
    assert rows["resident", "launch to first token"]["ratio"] == 2.0
    assert rows["1GiB", "decode"]["best_peer"] == "q4_0"
    assert rows["1GiB", "launch to first token"]["engines"]["fate"] == {
        "median": 1.0,
        "range": [1.0, 1.0],
        "repeats": 2,
    }
    assert found["failed"] == [
        {"budget": "1GiB", "engine": "q4_1", "why": "killed at the memory limit"},
        {"budget": "1GiB", "engine": "q4_0 repacked", "why": "not run: its repacked copy is larger than the limit"},
    ]
    assert found["agreement"]["q4_1"] == {"correlation": pytest.approx(1.0), "same_top_token": 1.0}
    assert found["peer"]["system"] == "CPU"
    json.dumps(found)


def test_without_any_peer_there_is_no_ratio(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.run_worker
    monkeypatch.setattr(module, "run_worker", lambda c, g, n: {"failed": "x"} if "repack" in g else real(c, g, n))
    _, found = compared(log)
    assert {(row["best_peer"], row["ratio"]) for row in found["rows"]} == {(None, None)}
    assert all(set(row["engines"]) == {"fate"} for row in found["rows"])


def test_fates_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    store = tiny_store("qwen2_moe", dense_bits=4)
    given = job(model=str(store), memory=None, system="exact", max_context=32, logits=str(tmp_path / "x.npy"))
    monkeypatch.syspath_prepend(module.FATE_WORKER.parent)
    monkeypatch.setattr(sys, "argv", [str(module.FATE_WORKER), json.dumps(given)])
    runpy.run_path(str(module.FATE_WORKER), run_name="__main__")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["counters"]["tokens"] == 2
    assert found["experts"] == 24
    assert np.load(tmp_path / "x.npy").shape == (3, 259)


def test_a_worker_that_fails_says_why() -> None:
    failing = "import sys; sys.exit('no such thing')"
    assert run_worker([sys.executable, "-c", failing], {}, None) == {"failed": "no such thing"}
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_worker([sys.executable, "-c", killed], {}, None) == {"failed": "killed at the memory limit"}
    assert run_worker([sys.executable, "-c", "print('words'); print('{}')"], {}, None) == {}


def test_a_peer_that_is_missing() -> None:
    with pytest.raises(UsageError, match=r"has no llama-cpp-python: python -m venv peer && .*--peer-python"):
        peer_version(sys.executable)
    with pytest.raises(UsageError, match=r"nowhere cannot be run .*pip install llama-cpp-python"):
        peer_version("/nowhere")


def test_bytes_of_a_token() -> None:
    store = tiny_store("qwen2_moe", dense_bits=4, hidden_size=128, moe_intermediate_size=64, num_hidden_layers=2)
    experts = 2 * 3 * (3 * 64 * 128 * 4.5 / 8)
    attention, shared, head = 2 * (2 * 128 * 128 + 2 * 64 * 128), 2 * 3 * 96 * 128, 259 * 128
    dense = (attention + shared + head) * 4.5 / 8
    assert weight_bytes_per_token(store) == pytest.approx(experts + dense, rel=0.1)


def test_a_memory_group_limits_and_goes() -> None:
    try:
        with MemoryGroup(200 * MIB) as group:
            path = Path(group.command()[-1])
            hungry = [*group.command(), sys.executable, "-c", "x = bytearray(400 << 20); print(len(x))"]
            done = subprocess.run(hungry, capture_output=True, text=True)
            assert done.returncode in (-9, 137)
            modest = [*group.command(), sys.executable, "-c", "print('inside')"]
            assert subprocess.run(modest, capture_output=True, text=True).stdout == "inside\n"
            peak = group.peak_bytes()
            assert peak is None or 0 < peak <= 200 * MIB
    except UsageError as error:
        pytest.skip(str(error))
    assert not path.exists()


def test_no_cgroup_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match=r"run as root, or leave budgets out with --budgets resident"):
        MemoryGroup(MIB).__enter__()
