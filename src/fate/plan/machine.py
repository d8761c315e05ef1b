"""What this process holds resident, and what this machine, or its cgroup, leaves it."""

from __future__ import annotations

import os
import re
from pathlib import Path


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """What this process could hold resident in all: free memory (or what its cgroup leaves) plus what it holds; but for
    pages of files, which count as free."""
    meminfo = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    available = int(meminfo["MemAvailable"]) * 1024 + (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
    return min(available, cgroup_limit_bytes() or available)


def cgroup_limit_bytes() -> int | None:
    """The tightest memory limit of this process's cgroups and their parents (v1 or v2), None when there is none."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for level in (group, *group.parents):  # in a container the path is often the host's; the root's file is ours
            if level.is_relative_to(root) and (level / name).is_file():
                text = (level / name).read_text().strip()
                limits += [int(text)] if text.isdigit() else []
    return min((limit for limit in limits if limit < 1 << 60), default=None)
