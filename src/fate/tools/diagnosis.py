"""Facts about this machine: versions, kernels, and the limits that speed is measured against."""

from __future__ import annotations

import mmap
import os
import platform
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fate import kernels
from fate.errors import UsageError
from fate.fileio import anonymous_memory
from fate.kernels import native
from fate.plan.machine import available_bytes, cgroup_limit_bytes
from fate.units import MIB, format_bytes

_PACKAGES = ("fate-moe", "torch", "transformers", "safetensors", "huggingface_hub", "hqq")
_FUSED = (
    "SwiGLU, also clamped, scaled or softcapped; GELU (exact, tanh), ReLU, ReLU^2; gated or not, with or without "
    "biases; a module is tried at load, and another activation runs as its own code around packed linears"
)


def diagnose(path: Path) -> dict[str, Any]:
    """Measurements take about two seconds and 256 MiB of memory and of disk at `path`."""
    active = kernels.active()
    direct, disk = disk_read_gb_per_s(path)
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "memory_available": format_bytes(available_bytes()),
        "memory_cgroup_limit": format_bytes(limit) if (limit := cgroup_limit_bytes()) else "none",
        "memory_read_gb_per_s": memory_read_gb_per_s(),
        "disk_read_gb_per_s": disk,
        "o_direct": "yes" if direct else "no: reads go through the page cache",
        "kernels": f"{active.name} ({active.detail})",
        "instruction_sets": ", ".join(native.available()),
        "fused_experts": _FUSED,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def memory_read_gb_per_s(size: int = 512 * MIB, repeats: int = 5) -> float:
    """Best of a few sums over memory far larger than the caches, in large pages as weights are, all threads."""
    size = min(size, max(available_bytes() // 4 // MIB, 64) * MIB)
    data = torch.frombuffer(anonymous_memory(size), dtype=torch.int64).fill_(1)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return size / best / 1e9


def disk_read_gb_per_s(path: Path, size: int = 256 * MIB, read_bytes: int = 4 * MIB) -> tuple[bool, float]:
    """(O_DIRECT works, best of two passes with two readers) over a temporary file at `path`. Raises UsageError where it
    is no directory."""
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory: give one on the disk to measure")
    with tempfile.NamedTemporaryFile(dir=path, prefix=".fate-doctor-") as file:
        block = os.urandom(read_bytes)
        for _ in range(size // read_bytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        direct = True
        try:
            fd = os.open(file.name, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError:
            direct, fd = False, os.open(file.name, os.O_RDONLY)
        try:
            best = max(_read_all(fd, size, read_bytes) for _ in range(2))
        finally:
            os.close(fd)
    return direct, best


def _read_all(fd: int, size: int, read_bytes: int) -> float:
    def reader(first: int) -> int:
        with mmap.mmap(-1, read_bytes) as buffer:
            return sum(os.preadv(fd, [buffer], at) for at in range(first * read_bytes, size, 2 * read_bytes))

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        done = sum(pool.map(reader, range(2)))
    return done / (time.perf_counter() - start) / 1e9
