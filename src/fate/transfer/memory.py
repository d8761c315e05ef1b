"""The tier of another memory: all records of a store in RAM, moved into slots at the pace of a link that is emulated.

It stands in for the bus between host memory and an accelerator: the link is one, shared by all readers, and carries
one transfer after the other. Which bytes move, and when they may be used, is real; only the waiting is imitated.

>>> parse_link("12GB/s")
12000000000.0
>>> link = Link(1000.0)
>>> link.book(500, now=10.0), link.book(500, now=10.0)  # the second waits for the first
(10.5, 11.0)
"""

from __future__ import annotations

import ctypes
import math
import mmap
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fate.core import ExpertKey
from fate.errors import LinkMemoryError, LinkSpeedError
from fate.kernels import native
from fate.memory import available_bytes, resident_bytes
from fate.store.reader import StoreReader
from fate.transfer.scheduler import Progress

_SPEED = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B/s\s*")
_READERS = 2  # threads that fill the memory from the disk
# A link has a queue, so the next transfer starts when the last one ends, not when a thread has noticed that. What
# comes within HANDOFF_S of the notice starts as if it had been queued, but never more than MAX_LATE_S in the past.
HANDOFF_S = 150e-6
MAX_LATE_S = 2e-3


def parse_link(value: str | int | float) -> float:
    """Bytes per second from "12GB/s", "1.5 GB/s", "800MB/s" (powers of ten), "1GiB/s" or a number; raises
    LinkSpeedError for anything that is no positive speed."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        speed = float(value)
    elif isinstance(value, str) and (match := _SPEED.fullmatch(value)) is not None and (match[2] or not match[3]):
        speed = float(match[1]) * (1024.0 if match[3] else 1000.0) ** " KMGT".index(match[2].upper() or " ")
    else:
        raise LinkSpeedError(value)
    if not math.isfinite(speed) or speed < 1:
        raise LinkSpeedError(value)
    return speed


class Link:
    """One transfer after the other at `bytes_per_s` (None: as fast as memory copies), kept by a clock that threads
    share. The pace may be changed at any time: what is booked already keeps its own."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._noticed_at = 0.0

    @property
    def bytes_per_s(self) -> float | None:
        return self._bytes_per_s

    @bytes_per_s.setter
    def bytes_per_s(self, value: float | None) -> None:
        with self._lock:
            self._bytes_per_s = value
            self._free_at = 0.0

    def book(self, length: int, now: float) -> float:
        """When (on the clock of `now`, seconds) a transfer of `length` bytes that is asked for now will be through."""
        with self._lock:
            if self._bytes_per_s is None:
                return now
            late = MAX_LATE_S if now - self._noticed_at <= HANDOFF_S else 0.0
            self._free_at = max(self._free_at, now - late) + length / self._bytes_per_s
            return self._free_at

    def give_back(self, length: int) -> None:
        """So many of the bytes booked last were not asked for after all."""
        with self._lock:
            if self._bytes_per_s is not None:
                self._free_at -= length / self._bytes_per_s

    def notice(self, now: float) -> None:
        """A reader has seen that its transfer is through."""
        with self._lock:
            self._noticed_at = now


class MemoryRecords:
    """All records of a store in one page-aligned anonymous mapping, checked against their checksums. Any number of
    sources may read it; the memory goes back with the last reference.

    Raises LinkMemoryError (not enough memory is free), StoreError and ChecksumError.
    """

    def __init__(self, reader: StoreReader, progress: Callable[[int, int], None] | None = None) -> None:
        self.header = header = reader.header
        self._first = header.record_offset(0, 0)
        self.num_bytes = header.file_bytes - self._first
        free = available_bytes() - resident_bytes()
        if self.num_bytes > free:
            raise LinkMemoryError(self.num_bytes, free)
        memory = mmap.mmap(-1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(memory)
        self._fill(reader, progress)
        self.data = np.frombuffer(memory, dtype=np.uint8)

    def start(self, key: ExpertKey) -> int:
        """Where the record of `key` begins in `data` (uint8 [num_bytes])."""
        return self.header.record_offset(*key) - self._first

    def _fill(self, reader: StoreReader, progress: Callable[[int, int], None] | None) -> None:
        keys = [ExpertKey(at, e) for at, layer in enumerate(self.header.layers) for e in range(layer.num_experts)]

        def read(key: ExpertKey) -> int:
            start, length = self.start(key), self.header.layout(key.layer).record_bytes
            record = self._view[start : start + length]
            reader.read_into(key, record, 0)
            reader.verify(key, record, prefix=True, rest=True)
            return length

        done = 0
        with ThreadPoolExecutor(_READERS, "fate-records") as pool:
            try:
                for length in pool.map(read, keys):
                    done += length
                    if progress is not None:
                        progress(done, self.num_bytes)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after an error or Ctrl-C, not the other thousands


class PacedMemorySource:
    """`transfer.scheduler.Source` over records in memory; `slot_view(slot)` gives a slot's writable bytes. Sources that
    share a `link` share its pace."""

    def __init__(self, records: MemoryRecords, slot_view: Callable[[int], memoryview], link: Link) -> None:
        self._records: MemoryRecords | None = records
        self._slot_view = slot_view
        self._link = link

    def read(self, key: ExpertKey, slot: int, offset: int, length: int, progress: Progress) -> None:
        records = self._records
        assert records is not None, "closed"
        pace, done = self._link.bytes_per_s, progress.done
        through = self._link.book(length, time.perf_counter())
        start = through - length / pace if pace else 0.0
        source = records.data.ctypes.data + records.start(key) + offset
        target = ctypes.addressof(ctypes.c_char.from_buffer(self._slot_view(slot))) + offset
        if (cpu := native.extension()) is not None:
            cpu.copy_paced(target, source, length, progress.chunk_bytes, start, pace or 0.0, progress.address)
        else:
            ctypes.memmove(target, source, length)  # releases the interpreter, as sleeping does
            if pace and (left := through - time.perf_counter()) > 0:
                time.sleep(left)
            progress.add(length)
        self._link.give_back(length - (progress.done - done))
        self._link.notice(time.perf_counter())

    def verify(self, key: ExpertKey, slot: int, offset: int, length: int) -> None:
        """Nothing: records were checked when they came into memory."""

    def close(self) -> None:
        self._records = None
