"""What a benchmark's JSON says about where it ran."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh64_hexdigest

from fate import kernels


def environment() -> dict[str, Any]:
    """Commit (of a source checkout), versions, processor, threads and kernels."""
    return {
        "commit": _commit(),
        "fate": metadata.version("fate-moe"),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": kernels.active().name,
        "platform": platform.platform(),
    }


def peak_resident_bytes() -> int:
    """The most resident memory this process ever had."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else 0


def _processor() -> str:
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.processor()


def _commit() -> str | None:
    """With -dirty and a digest of the changes where there are any."""
    git = ["git", "-C", str(Path(__file__).parent)]

    def ask(*words: str) -> str:
        return subprocess.run([*git, *words], capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        commit = ask("describe", "--always", "--dirty")
        return f"{commit}-{xxh64_hexdigest(ask('diff', 'HEAD').encode())[:8]}" if commit.endswith("-dirty") else commit
    except (OSError, subprocess.SubprocessError):
        return None
