"""Open a store, refuse a damaged one, and read its records.

`StoreReader` owns `experts.fate`: header, checksums, and positioned reads that bypass the page cache where the file
system allows it (so that the cache does not double the memory). Packed dense weights: `ahead.py`.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import xxhash
from safetensors import SafetensorError, safe_open

from fate.core import ExpertKey
from fate.errors import ChecksumError, StoreError, StoreMismatchError
from fate.fileio import Progress
from fate.store import format as fmt
from fate.store.files import (
    CHECKSUMS_FILE,
    DENSE_FILE,
    EXPERTS_FILE,
    HEADER_KEY,
    PACKED_FILE,
    check_tensor,
    is_store,
    open_past_cache,
    read_checksums,
    read_config,
)
from fate.store.tensorheader import TensorHeaderError, read_tensor_header

logger = logging.getLogger("fate.store")

__all__ = [
    "CHECKSUMS_FILE",
    "DENSE_FILE",
    "EXPERTS_FILE",
    "HEADER_KEY",
    "PACKED_FILE",
    "StoreReader",
    "checksum_of",
    "is_store",
    "read_config",
]

_CHUNK_BYTES = 4 << 20
# (file descriptor, address, length, offset in the file, chunk, address of a Progress) -> errno, 0 where all went well.
ReadFile = Callable[[int, int, int, int, int, int], int]


class StoreReader:
    """Records of one store, read by position, from any thread.

    Raises StoreError (not a store, cut short), StoreVersionError, ChecksumError (header), StoreMismatchError
    (config.json of another conversion) when opened, ChecksumError from `verify`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.file = self.path / EXPERTS_FILE
        self.header, self._checksums = _read_header(self.file)
        self._check_siblings()
        self._fd = _open_direct(self.file)
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        self._verified: set[tuple[int, bool]] = set()

    def read_into(
        self,
        key: ExpertKey,
        buffer: memoryview,
        offset: int,
        progress: Progress | None = None,
        read_file: ReadFile | None = None,
    ) -> None:
        """Fill page-aligned `buffer` with the record's bytes from `offset` (page-aligned too).

        progress: counts bytes as they arrive and may stop the read at the end of a chunk. read_file: what reads chunk
        after chunk without the interpreter, None: Python does. Raises StoreError, OSError.
        """
        at = self.header.record_offset(*key) + offset
        if progress is None or read_file is None:
            return self._read_plainly(key, buffer, at, progress)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        error = read_file(self._fd, address, len(buffer), at, progress.chunk_bytes, progress.address)
        if error == errno.ENODATA:
            raise self._ends_inside(key)
        if error:
            raise OSError(error, os.strerror(error), str(self.file))
        return None

    def _read_plainly(self, key: ExpertKey, buffer: memoryview, at: int, progress: Progress | None) -> None:
        done = 0
        while done < len(buffer) and not (progress is not None and done and progress.stop):
            end = len(buffer) if progress is None else min(done + progress.chunk_bytes, len(buffer))
            got = os.preadv(self._fd, [buffer[done:end]], at + done)
            if got == 0 or (done + got < len(buffer) and got % fmt.PAGE_BYTES):  # only the file's end cuts a page
                raise self._ends_inside(key)
            done += got
            if progress is not None:
                progress.add(got)

    def _ends_inside(self, key: ExpertKey) -> StoreError:
        return StoreError(f"{self.file} ends inside {key}: convert the checkpoint again")

    def verify(self, key: ExpertKey, record: memoryview, *, prefix: bool, rest: bool) -> None:
        """Check the halves of `record` that were read against their checksums, each the first time it is read."""
        index = self.header.record_index(*key)
        split = self.header.layout(key.layer).split
        wanted = [(False, record[:split])] if prefix else []
        if rest:
            wanted.append((True, record[split:]))
        for half, data in wanted:
            if (index, half) in self._verified:
                continue
            at = index * fmt.CHECKSUM_BYTES + (8 if half else 0)
            if xxhash.xxh64_intdigest(data) != int.from_bytes(self._checksums[at : at + 8], "little"):
                raise ChecksumError(f"{self.file}: {key} is damaged (checksum differs): convert the checkpoint again")
            self._verified.add((index, half))

    def close(self) -> None:
        self._finalizer()

    def _check_siblings(self) -> None:
        if self.file.stat().st_size < self.header.file_bytes:
            size, need = self.file.stat().st_size, self.header.file_bytes
            raise StoreError(f"{self.file} is cut short ({size} of {need} bytes): convert the checkpoint again")
        stored = read_config(self.path)["quantization_config"]
        if stored.get("fingerprint") != self.header.fingerprint:
            raise StoreMismatchError(
                f"{self.file} holds the experts of another conversion than {self.path / 'config.json'}: "
                "convert the checkpoint again"
            )
        _check_tensor_file(self.path / DENSE_FILE, self.header.fingerprint)
        _verify_dense(self.path)
        if stored.get("packed"):
            _check_tensor_file(self.path / PACKED_FILE, self.header.fingerprint)


def _check_tensor_file(file: Path, fingerprint: str) -> None:
    """The file is whole (its header matches its size) and of this conversion."""
    try:
        with safe_open(file, framework="pt") as f:
            recorded = (f.metadata() or {}).get("fingerprint")
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{file} cannot be read ({error}): convert the checkpoint again") from None
    if recorded != fingerprint:
        raise StoreMismatchError(f"{file} is of another conversion than {EXPERTS_FILE}: convert the checkpoint again")


def _read_header(file: Path) -> tuple[fmt.StoreHeader, bytes]:
    try:
        with open(file, "rb") as f:
            length, checksum = fmt.decode_preamble(f.read(fmt.PREAMBLE_BYTES), file)
            blob = f.read(length)
            if len(blob) < length or xxhash.xxh64_intdigest(blob) != checksum:
                raise ChecksumError(f"{file}: the header is damaged: convert the checkpoint again")
            header = fmt.decode_header(blob)
            f.seek(header.checksums_offset)
            checksums = f.read(header.num_records * fmt.CHECKSUM_BYTES)
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}") from None
    return header, checksums


def _open_direct(file: Path) -> int:
    """A file descriptor that bypasses the page cache, or a warning that none can be had."""
    fd, direct = open_past_cache(file)
    if not direct:
        logger.warning("%s: this file system refuses O_DIRECT; reads go through the page cache", file)
    return fd


def checksum_of(fd: int, start: int, length: int) -> int:
    """xxh64 of bytes [start, start + length) of an open file."""
    digest = xxhash.xxh64()
    for at in range(start, start + length, _CHUNK_BYTES):
        digest.update(os.pread(fd, min(_CHUNK_BYTES, start + length - at), at))
    return digest.intdigest()


def _verify_dense(path: Path) -> None:
    """What transformers will load itself, checked before it does."""
    file, expected = path / DENSE_FILE, read_checksums(path, DENSE_FILE)
    try:
        header = read_tensor_header(file)
    except TensorHeaderError as error:
        raise StoreError(f"{file} {error}: convert the checkpoint again") from None
    with file.open("rb") as f:
        start = header.data_start
        check_tensor(file, HEADER_KEY, expected.get(HEADER_KEY), checksum_of(f.fileno(), 0, start))
        for tensor in header.tensors:
            got = checksum_of(f.fileno(), start + tensor.start, tensor.end - tensor.start)
            check_tensor(file, tensor.name, expected.get(tensor.name), got)
