"""What this machine leaves a process."""

import os
from pathlib import Path

from fate.plan import machine
from fate.plan.machine import available_bytes


def test_pages_of_files_are_not_available_twice(monkeypatch):
    """MemAvailable counts them already, whoever has them mapped."""
    page, real = os.sysconf("SC_PAGE_SIZE"), Path.read_text
    texts = {"/proc/meminfo": "MemFree: 1 kB\nMemAvailable: 1000 kB\n", "/proc/self/statm": "900 70 30 1 0 5 0\n"}
    monkeypatch.setattr(Path, "read_text", lambda self, **options: texts.get(str(self)) or real(self, **options))
    monkeypatch.setattr(machine, "cgroup_limit_bytes", lambda: None)
    assert available_bytes() == 1000 * 1024 + 40 * page
    monkeypatch.setattr(machine, "cgroup_limit_bytes", lambda: 4096)
    assert available_bytes() == 4096
