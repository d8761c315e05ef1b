"""The tier of another memory: all records of a store in RAM, moved into slots at the pace of a link that is emulated.

It stands in for the bus between host memory and an accelerator: the link is one, shared by all readers, and carries
one transfer after the other. Which bytes move, and when they may be used, is real; only the waiting is imitated.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fate.core import ExpertKey
from fate.errors import LinkMemoryError
from fate.fileio import Progress, anonymous_memory
from fate.kernels import native
from fate.plan.machine import available_bytes, resident_bytes
from fate.store.reader import StoreReader
from fate.transfer.link import Link
from fate.units import format_bytes

_READERS = 2  # threads that fill the memory from the disk


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
            raise LinkMemoryError(format_bytes(self.num_bytes), format_bytes(free))
        memory = anonymous_memory(self.num_bytes)
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
