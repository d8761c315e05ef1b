"""Files below the page cache, and memory of whole pages: the bottom room for bytes, standard library only.

>>> fd, direct = open_direct(Path("qwen.fate/experts.fate"))
>>> replace_file(Path("report.json"), "{}")
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from contextlib import suppress
from pathlib import Path

_DIRECT_BYTES = 4096  # what a read past the page cache is aligned to


class Progress:
    """What the thread that reads and the others tell each other of one read, without the interpreter's lock: two
    int64 at `address`, `stop` and `done` (bytes). chunk_bytes: how much is read before `stop` is looked at."""

    def __init__(self, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self._fields = (ctypes.c_int64 * 2)()
        self.address = ctypes.addressof(self._fields)

    @property
    def stop(self) -> bool:
        return self._fields[0] != 0

    @stop.setter
    def stop(self, value: bool) -> None:
        self._fields[0] = int(value)

    @property
    def done(self) -> int:
        return self._fields[1]

    def add(self, num_bytes: int) -> None:
        self._fields[1] += num_bytes


def open_direct(file: Path) -> tuple[int, bool]:
    """A file descriptor, and whether it bypasses the page cache: where the file system allows that, it does."""
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        fd = -1
        try:
            fd = os.open(file, os.O_RDONLY | direct)
            with mmap.mmap(-1, _DIRECT_BYTES) as page, memoryview(page) as view:
                os.preadv(fd, [view], 0)
            return fd, True
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    return os.open(file, os.O_RDONLY), False


def drop_cache(fd: int, offset: int = 0, length: int = 0) -> None:
    """Let the page cache forget [offset, offset + length) of an open file, 0: to its end; only clean pages go."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # advice: a file system need not take it
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def replace_file(path: Path, text: str) -> None:
    """`path` holds `text`, for everyone to read, or, where something fails, what it held before. Raises OSError."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            file.write(text)
            file.close()
            os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def anonymous_memory(size: int, *, large_pages: bool = True) -> mmap.mmap:
    """`size` bytes of zeros that begin on a page, resident once they are written; large_pages: where the system has
    them, which is read a sixth faster (fewer TLB misses)."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if large_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
