"""Writing a store: every file laid out in advance, items written in place, a journal that survives `kill -9`.

Work happens in `OUT.partial`. An item is journalled only after its bytes are on disk, so whatever the journal names
need not be made again. The header page of `experts.fate` is written last and then the directory is renamed: nothing
called OUT is ever incomplete.

>>> with StoreWriter(Path("out"), plan) as writer:
...     for layer, expert in records:
...         if not writer.has_record(layer, expert):
...             writer.write_record(layer, expert, encode_record(matrices, plan.header.layout(layer)))
...     writer.finalize()
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

from fate.errors import DiskFullError, OutputExistsError, UsageError
from fate.fileio import drop_cache
from fate.store.format import CHECKSUM_BYTES
from fate.store.plan import StorePlan
from fate.store.reader import CHECKSUMS_FILE, EXPERTS_FILE, HEADER_KEY, checksum_of
from fate.units import MIB, format_bytes

_JOURNAL = "journal.jsonl"
SYNC_BYTES, _SYNC_S = 64 * MIB, 1.0
_log = logging.getLogger(__name__)


class StoreWriter:
    """Fills `out` according to `plan`; a context manager that leaves a resumable `OUT.partial` unless finalized.

    Raises OutputExistsError where `out` exists and `force` is not set (with it, the old store stays until the last
    moment), DiskFullError where the plan does not fit, UsageError where another process is writing the same store.
    """

    def __init__(self, out: Path, plan: StorePlan, *, force: bool = False) -> None:
        if out.exists() and not force:
            raise OutputExistsError(out)
        self.out, self.plan = out, plan
        self.partial = out.with_name(out.name + ".partial")
        self.replaced = out.with_name(out.name + ".replaced")
        _check_ours(self.partial, _JOURNAL)
        _check_ours(self.replaced, EXPERTS_FILE)
        began = not self.partial.exists()
        self._done: dict[str, list[int]] = {}
        self._pending: list[str] = []
        self._dirty_bytes, self._synced_at = 0, time.monotonic()
        self._files: dict[str, int] = {}
        self.partial.mkdir(parents=True, exist_ok=True)
        self._journal = _open_journal(self.partial / _JOURNAL)
        try:
            with _disk_errors(out, plan.total_bytes):
                self._resume()
                self._check_space()
                self._lay_out()
        except BaseException:
            self._close_files()
            if began and not self._done:
                shutil.rmtree(self.partial)
            raise

    def has_record(self, layer: int, expert: int) -> bool:
        return _record_item(layer, expert) in self._done

    def has_tensor(self, file: str, key: str) -> bool:
        return f"{file}/{key}" in self._done

    def write_record(self, layer: int, expert: int, record: torch.Tensor) -> None:
        """record: uint8 [layout.record_bytes]."""
        layout, data = self.plan.header.layout(layer), _bytes_of(record)
        assert len(data) == layout.record_bytes
        self._write(EXPERTS_FILE, self.plan.header.record_offset(layer, expert), data)
        prefix, rest = data[: layout.split], data[layout.split :]
        self._finish(_record_item(layer, expert), [xxhash.xxh64_intdigest(prefix), xxhash.xxh64_intdigest(rest)])

    def write_tensor(self, file: str, key: str, parts: Iterable[tuple[int, torch.Tensor]]) -> None:
        """One tensor of a tensor file, as (byte offset within the tensor, piece) pairs that together cover it."""
        start, length = self.plan.tensor_files[file].span(key)
        for offset, piece in parts:
            data = _bytes_of(piece)
            assert offset + len(data) <= length
            self._write(file, start + offset, data)
        self._finish(f"{file}/{key}", [checksum_of(self._files[file], start, length)])

    def finalize(self) -> Path:
        """Write checksums, small files and last the header page, then rename `OUT.partial` to `OUT`."""
        assert len(self._done) == self.plan.num_items
        self._sync()
        header = self.plan.header
        self._write(EXPERTS_FILE, header.checksums_offset, self._checksum_table())
        for name, content in {**self.plan.small_files, CHECKSUMS_FILE: self._tensor_checksums()}.items():
            with _disk_errors(self.out, len(content)):
                _write_small_file(self.partial / name, content)
        self._sync()
        self._write(EXPERTS_FILE, 0, header.encode(xxhash.xxh64_intdigest(header.json_bytes)))
        self._sync()
        _fsync_directory(self.partial)
        self._publish()
        return self.out

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            if self._pending:
                self._sync()
        finally:
            self._close_files()

    def _resume(self) -> None:
        """Take over what the journal names, or start afresh where it is another source's or options'."""
        lines, length = _read_journal(self._journal)
        if lines and lines[0] == self.plan.header.fingerprint:
            self._done = dict(lines[1:])
            os.ftruncate(self._journal, length)  # a line cut short by a crash goes
            return
        leftovers = [path for path in self.partial.iterdir() if path.name != _JOURNAL]
        if lines or leftovers:
            _log.warning(
                "%s is of another source, other options or another version of Fate: starting again", self.partial
            )
        for path in leftovers:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.ftruncate(self._journal, 0)
        _pwrite_all(self._journal, _journal_line(self.plan.header.fingerprint), 0)
        os.fsync(self._journal)
        _fsync_directory(self.partial)

    def _check_space(self) -> None:
        present = sum(path.stat().st_blocks * 512 for path in self.partial.iterdir())
        needed, free = self.plan.total_bytes - present, shutil.disk_usage(self.partial).free
        if needed > free:
            raise DiskFullError(
                f"{self.out} needs {format_bytes(needed)} more and its file system has {format_bytes(free)} free: "
                "free some space or choose another OUT"
            )

    def _lay_out(self) -> None:
        for name, size in self.plan.file_sizes.items():
            self._files[name] = file = os.open(self.partial / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.ftruncate(file, size)
        for name, layout in self.plan.tensor_files.items():
            self._write(name, 0, layout.header)

    def _write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        with _disk_errors(self.out, len(data)):
            _pwrite_all(self._files[name], data, offset)
        self._dirty_bytes += len(data)

    def _finish(self, item: str, checksums: list[int]) -> None:
        self._done[item] = checksums
        self._pending.append(item)
        if self._dirty_bytes >= SYNC_BYTES or time.monotonic() - self._synced_at >= _SYNC_S:
            self._sync()

    def _sync(self) -> None:
        """Data first, then the journal lines that vouch for it; written pages leave the page cache."""
        with _disk_errors(self.out, self._dirty_bytes):
            for file in self._files.values():
                os.fdatasync(file)
                drop_cache(file)
            lines = b"".join(_journal_line([item, self._done[item]]) for item in self._pending)
            _pwrite_all(self._journal, lines, os.fstat(self._journal).st_size)
            os.fsync(self._journal)
        self._pending.clear()
        self._dirty_bytes, self._synced_at = 0, time.monotonic()

    def _checksum_table(self) -> bytes:
        table = bytearray()
        for layer, spec in enumerate(self.plan.header.layers):
            for expert in range(spec.num_experts):
                prefix, rest = self._done[_record_item(layer, expert)]
                table += prefix.to_bytes(CHECKSUM_BYTES // 2, "little") + rest.to_bytes(CHECKSUM_BYTES // 2, "little")
        return bytes(table)

    def _tensor_checksums(self) -> bytes:
        """checksums.json: tensor file -> tensor -> xxh64 of its bytes, in hexadecimal."""
        table = {
            file: {HEADER_KEY: f"{xxhash.xxh64_intdigest(layout.header):016x}"}
            | {entry.key: f"{self._done[f'{file}/{entry.key}'][0]:016x}" for entry in layout.entries}
            for file, layout in self.plan.tensor_files.items()
        }
        return json.dumps(table, indent=1).encode() + b"\n"

    def _publish(self) -> None:
        if self.replaced.exists():
            shutil.rmtree(self.replaced)
        if self.out.exists():
            os.rename(self.out, self.replaced)
        os.rename(self.partial, self.out)
        _fsync_directory(self.out.parent)
        # The journal goes last: a partial that is whole but not yet renamed stays resumable.
        (self.out / _JOURNAL).unlink()
        if self.replaced.exists():
            shutil.rmtree(self.replaced)

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])
        os.close(self._journal)


def _check_ours(path: Path, mark: str) -> None:
    """Refuse to touch a directory of the name we would use that we did not make (`mark` is in all we made)."""
    if path.exists() and not (path.is_dir() and ((path / mark).is_file() or not any(path.iterdir()))):
        raise UsageError(f"{path} is not of our making, so it is not replaced: move it away or choose another OUT")


def _record_item(layer: int, expert: int) -> str:
    return f"{EXPERTS_FILE}/{layer}/{expert}"


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _open_journal(path: Path) -> int:
    """A descriptor with an exclusive lock, so that two processes cannot write one store."""
    journal = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(journal)
        raise UsageError(f"another process is writing {path.parent}: wait for it or choose another OUT") from None
    except OSError as error:
        os.close(journal)
        raise UsageError(
            f"{path.parent}: its file system has no locks ({error.strerror}): choose another OUT"
        ) from None
    return journal


def _journal_line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _read_journal(journal: int) -> tuple[list[Any], int]:
    """(whole lines, their length in bytes): what follows the last whole line was cut short by a crash."""
    content = os.pread(journal, os.fstat(journal).st_size, 0)
    lines, length = [], 0
    for line in content.splitlines(keepends=True):
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            lines.pop()
            break
        length += len(line)
    return lines, length


def _pwrite_all(file: int, data: memoryview | bytes, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(file, view[done:], offset + done)


def _write_small_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _fsync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def _disk_errors(out: Path, length: int) -> Iterator[None]:
    """Turn a full disk or quota into DiskFullError; the partial store stays and can be resumed."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(out.parent).free
        raise DiskFullError(
            f"the disk is full: {format_bytes(length)} more were to be written to {out} and {format_bytes(free)} are "
            "free; free some space and run the same command to go on where it stopped"
        ) from error
