"""The memory expert records are read into: one page-aligned allocation cut into equal slots."""

from __future__ import annotations

import ctypes
import mmap

import torch

from fate.fileio import anonymous_memory


class SlotPool:
    """`num_slots` slots of `slot_bytes` (a multiple of the page size) in one anonymous mapping.

    The pages become resident as slots are first written. `tensor`: the whole pool, uint8 [num_slots * slot_bytes].
    """

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._map = anonymous_memory(num_slots * slot_bytes, large_pages=slot_bytes >= 1 << 20)
        self._view = memoryview(self._map)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    def view(self, slot: int) -> memoryview:
        """Writable bytes of one slot."""
        return self._view[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def offset(self, slot: int) -> int:
        """Byte offset of a slot in `tensor`."""
        return slot * self.slot_bytes

    def populate(self) -> None:
        """Make every page resident now, before anything is read into a slot: to measure what comes later without what
        fresh memory costs (on a virtual machine up to ten times as much as a read from the disk)."""
        self.tensor[:: mmap.PAGESIZE] = 0

    def close(self) -> None:
        """Give the pages back now, whoever still holds a view (reading it then gives zeros)."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(len(self._map)), mmap.MADV_DONTNEED)
