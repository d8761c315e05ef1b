"""A memory cgroup for one process: what runs in it, page cache included, keeps to a limit or is killed.

>>> with MemoryGroup(4 * GIB) as group:
...     subprocess.run([*group.command(), "python", "-c", "print('inside')"])
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fate.errors import UsageError
from fate.units import format_bytes

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


class MemoryGroup:
    """A new cgroup (v1 or v2) of `limit_bytes`, removed at the end. UsageError where this user may make none."""

    def __init__(self, limit_bytes: int) -> None:
        old = (_V1 / "memory.limit_in_bytes").is_file()
        self._path = (_V1 if old else _V2) / f"fate-bench-{os.getpid()}"
        self._peak = "memory.max_usage_in_bytes" if old else "memory.peak"
        self._limit, self._limit_file = limit_bytes, "memory.limit_in_bytes" if old else "memory.max"

    def __enter__(self) -> MemoryGroup:
        try:
            self._path.mkdir(exist_ok=True)
            (self._path / self._limit_file).write_text(str(self._limit))
        except OSError as error:
            self._remove()
            raise UsageError(
                f"a memory limit of {format_bytes(self._limit)} needs a cgroup, and none can be made "
                f"({error.strerror}): run as root, or leave budgets out with --budgets resident"
            ) from error
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._remove()

    def command(self) -> list[str]:
        """What to put before a command so that it runs inside."""
        return ["sh", "-c", _ENTER, str(self._path)]

    def peak_bytes(self) -> int | None:
        """The most memory used inside, page cache included."""
        try:
            return int((self._path / self._peak).read_text())
        except (OSError, ValueError):
            return None

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.rmdir()
