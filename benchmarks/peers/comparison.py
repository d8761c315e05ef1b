"""Runs Fate and llama.cpp in turn, each in a fresh process, over memory budgets.

Within a budget: Fate, then every way of running the peer, and again, so often as asked. A limited process lives in a
memory cgroup and finds none of its files in the page cache. A process that fails or is killed counts as failed, with
its reason; nothing is filled in for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.cgroup import MemoryGroup
from benchmarks.peers.gguf_file import GgufFile
from fate.errors import UsageError
from fate.fileio import drop_cache
from fate.units import parse_memory

RESIDENT = "resident"
FATE_WORKER = Path(__file__).with_name("fate_worker.py")
_PEER_WORKER = Path(__file__).with_name("llama_worker.py")
_TIMEOUT_S = 1800
_OPENMP_AS_IT_COMES = ("env", "-u", "OMP_WAIT_POLICY")  # the command line that we are run from suits it to our kernels
_INSTALL = "python -m venv peer && peer/bin/pip install llama-cpp-python, then give --peer-python peer/bin/python"

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """budgets: "resident" or sizes. threads: numbers of threads tried by the peer; Fate runs with the first."""

    budgets: tuple[str, ...] = (RESIDENT, "6GiB", "4GiB", "3GiB")
    threads: tuple[int, ...] = (2,)
    repeats: int = 2
    prefills: tuple[int, ...] = (128, 512)
    launch_tokens: int = 32
    prompt_tokens: int = 64
    settle_tokens: int = 16
    decode_tokens: int = 32
    system: str = "exact"

    @property
    def max_context(self) -> int:
        needed = max(self.prompt_tokens + self.settle_tokens + self.decode_tokens, *self.prefills, self.launch_tokens)
        return -(-needed // 256) * 256


@dataclass(frozen=True)
class Variant:
    """One way of running the peer. repack: weights copied into the layout its fastest kernels read."""

    name: str
    file: GgufFile
    repack: bool


@dataclass
class Results:
    """runs: budget -> engine ("fate" or a variant's name) -> one result per repeat. logits: of the engines' prompts."""

    runs: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)


def variants(files: Sequence[GgufFile]) -> list[Variant]:
    """Every file as it is; Q4_0 repacked too, which is how the peer loads it unless told otherwise."""
    found = [Variant(file.form, file, False) for file in files]
    return found + [Variant("q4_0 repacked", file, True) for file in files if file.form == "q4_0"]


def peer_version(python: str) -> str:
    """llama-cpp-python's version in that environment; UsageError, saying how to install it, where it has none."""
    try:
        done = subprocess.run(
            [python, "-c", "import llama_cpp; print(llama_cpp.__version__)"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{python} cannot be run ({error}): {_INSTALL}") from None
    if done.returncode:
        raise UsageError(f"{python} has no llama-cpp-python: {_INSTALL}")
    return done.stdout.strip()


class Comparison:
    """One store, one peer; `results` grows as `run` goes on."""

    def __init__(self, store: Path, files: Sequence[GgufFile], peer_python: str, ids: list[int], settings: Settings):
        self._store, self._variants, self._python, self._ids = store, variants(files), peer_python, ids
        self.settings = settings
        self.results = Results()

    def run(self, progress: Progress) -> None:
        settings = self.settings
        done, total = 0, len(settings.budgets) * settings.repeats * (1 + len(self._variants))
        for budget in settings.budgets:
            runs = self.results.runs[budget] = {name: [] for name in ("fate", *(v.name for v in self._variants))}
            for repeat in range(settings.repeats):
                with tempfile.TemporaryDirectory() as folder:
                    compare = Path(folder) if repeat == 0 and not self.results.agreement else None
                    for name, found in runs.items():
                        progress(done, total, f"{budget}: {name}")
                        found.append(self._once(name, budget, compare))
                        done += 1
                    if compare is not None:
                        self._compare_logits(compare)

    def _once(self, name: str, budget: str, logits: Path | None) -> dict[str, Any]:
        limit = None if budget == RESIDENT else parse_memory(budget)
        variant = next((v for v in self._variants if v.name == name), None)
        job = {
            **{key: value for key, value in asdict(self.settings).items() if key not in ("budgets", "repeats")},
            "max_context": self.settings.max_context,
            "ids": self._ids,
            "prefills": self.settings.prefills if limit is None else (),
            "logits": str(logits / f"{name}.npy") if logits else None,
        }
        if variant is None:
            command = [sys.executable, str(FATE_WORKER)]
            job |= {"model": str(self._store), "memory": limit, "threads": self.settings.threads[:1]}
            files = list(self._store.iterdir())
        else:
            if limit is not None and variant.repack and variant.file.file_bytes > limit:
                return {"failed": "not run: its repacked copy is larger than the limit"}
            command = [*_OPENMP_AS_IT_COMES, self._python, str(_PEER_WORKER)]
            job |= {"model": str(variant.file.path), "repack": variant.repack}
            files = [variant.file.path]
        if limit is not None:
            drop_page_cache(files)
        return run_worker(command, job, limit)

    def _compare_logits(self, folder: Path) -> None:
        """How alike the engines' logits of the prompt are: correlation, and share of positions of one top token."""
        import numpy as np

        if not (folder / "fate.npy").is_file():
            return
        ours = np.load(folder / "fate.npy")
        for variant in self._variants:
            if (file := folder / f"{variant.name}.npy").is_file():
                theirs = np.load(file)
                self.results.agreement[variant.name] = {
                    "correlation": float(np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]),
                    "same_top_token": float((ours.argmax(1) == theirs.argmax(1)).mean()),
                }


def run_worker(command: list[str], job: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """The result that a worker prints last, or {"failed": why}."""
    if limit is None:
        return _result(command, job)
    with MemoryGroup(limit) as group:
        return {**_result([*group.command(), *command], job), "group_peak_bytes": group.peak_bytes()}


def _result(command: list[str], job: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps({**job, "started": time.monotonic()})
    try:
        done = subprocess.run([*command, text], capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {_TIMEOUT_S} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": "killed at the memory limit" if done.returncode in (-9, 137) else last}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def drop_page_cache(files: Sequence[Path]) -> None:
    for path in files:
        if path.is_file():
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(file)
                drop_cache(file)
            finally:
                os.close(file)
