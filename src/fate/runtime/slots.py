"""The memory expert records are read into: one page-aligned allocation cut into equal slots."""

from __future__ import annotations

import ctypes
import mmap

import torch

from fate.store.experts_ahead import slot_memory


class SlotPool:
    """`num_slots` slots of `slot_bytes` (a multiple of the page size) in one anonymous mapping.

    The pages become resident as slots are first written. memory: a larger mapping to take, whose first slots may be
    written already; beyond the pool its pages are given back. `tensor`: the whole pool, uint8 [num_slots * slot_bytes].
    """

    def __init__(self, num_slots: int, slot_bytes: int, memory: mmap.mmap | None = None) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        size = num_slots * slot_bytes
        self._map = slot_memory(size, slot_bytes) if memory is None else memory
        if len(self._map) > size:
            self._map.madvise(mmap.MADV_DONTNEED, size)
        self._view = memoryview(self._map)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8, count=size)

    def view(self, slot: int) -> memoryview:
        """Writable bytes of one slot."""
        return self._view[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def offset(self, slot: int) -> int:
        """Byte offset of a slot in `tensor`."""
        return slot * self.slot_bytes

    def close(self) -> None:
        """Give the pages back now, whoever still holds a view (reading it then gives zeros)."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(len(self._map)), mmap.MADV_DONTNEED)
