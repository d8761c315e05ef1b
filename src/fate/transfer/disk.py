"""The disk tier: a store's records read straight into slots."""

from __future__ import annotations

from collections.abc import Callable

from fate.core import ExpertKey
from fate.fileio import Progress
from fate.kernels import native
from fate.store.reader import StoreReader


class DiskSource:
    """`transfer.scheduler.Source` over a store; `slot_view(slot)` gives a slot's writable, page-aligned bytes."""

    def __init__(self, reader: StoreReader, slot_view: Callable[[int], memoryview]) -> None:
        self._reader = reader
        self._slot_view = slot_view

    def read(self, key: ExpertKey, slot: int, offset: int, length: int, progress: Progress) -> None:
        cpu = native.extension()
        buffer = self._slot_view(slot)[offset : offset + length]
        self._reader.read_into(key, buffer, offset, progress, None if cpu is None else cpu.read_file)

    def verify(self, key: ExpertKey, slot: int, offset: int, length: int) -> None:
        layout = self._reader.header.layout(key.layer)
        record = self._slot_view(slot)[: layout.record_bytes]
        self._reader.verify(key, record, prefix=offset == 0, rest=offset + length >= layout.record_bytes)

    def close(self) -> None:
        """The reader is its owner's to close: another engine may go on with it."""
