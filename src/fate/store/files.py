"""The files of a store: their names, and the small ones that are read whole. Without torch.

>>> is_store("assets")
False
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from fate.errors import ChecksumError, StoreError
from fate.store.format import PAGE_BYTES

EXPERTS_FILE = "experts.fate"
DENSE_FILE = "dense.safetensors"
PACKED_FILE = "packed.safetensors"
CHECKSUMS_FILE = "checksums.json"
HEADER_KEY = "__header__"  # in a file's checksums: its length field and header


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory laid out as a store (its content may still be damaged)."""
    return (Path(path) / EXPERTS_FILE).is_file()


def read_config(path: Path) -> dict[str, Any]:
    """The store's config.json; raises StoreError where it is missing or does not belong to a store."""
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path / 'config.json'} cannot be read ({error}): convert the checkpoint again") from None
    if config.get("quantization_config", {}).get("quant_method") != "fate":
        raise StoreError(f"{path / 'config.json'} is not a Fate store's: convert the checkpoint again")
    return config


def read_checksums(path: Path, name: str) -> dict[str, str]:
    """The checksums of the tensors of one file, and of its header (HEADER_KEY)."""
    try:
        table: dict[str, str] = json.loads((path / CHECKSUMS_FILE).read_text())[name]
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{path / CHECKSUMS_FILE} cannot be read ({error}): convert the checkpoint again") from None
    return table


def check_tensor(path: Path, name: str, expected: str | None, got: int) -> None:
    """Raise ChecksumError unless `got` is what was written down of the tensor `name` of the file `path`."""
    if expected != f"{got:016x}":
        raise ChecksumError(f"{path}: {name} is damaged (checksum differs): convert the checkpoint again")


def open_direct(file: Path) -> tuple[int, bool]:
    """A file descriptor, and whether it bypasses the page cache: where the file system allows that, it does."""
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        fd = -1
        try:
            fd = os.open(file, os.O_RDONLY | direct)
            _probe_direct(fd)
            return fd, True
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise StoreError(f"{file} cannot be opened: {error.strerror}") from None
    return os.open(file, os.O_RDONLY), False


def anonymous_memory(size: int, *, large_pages: bool = True) -> mmap.mmap:
    """`size` bytes of zeros that begin on a page, resident once they are written; large_pages: where the system has
    them, which is read a sixth faster (fewer TLB misses)."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if large_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _probe_direct(fd: int) -> None:
    with mmap.mmap(-1, PAGE_BYTES) as page, memoryview(page) as view:
        os.preadv(fd, [view], 0)
