"""Experts read into what will be the slots, by a thread, while Python imports what will compute with them.

Fresh memory is most of what a first prompt waits for beside the disk, and both are idle while a process starts. Some of
each layer's experts are read, as many layers alike: a prompt of some tens of tokens asks for nearly all. Without torch:
this runs before it is imported.

>>> experts = ExpertsAhead(Path("qwen.fate"), max_bytes=2 << 30)
>>> experts.start(after=dense)
>>> memory, keys = experts.take()  # slot i of `memory` holds the record of keys[i]
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fate.core import ExpertKey
from fate.errors import FateError
from fate.memory import parse_experts
from fate.store.ahead import DenseWeights
from fate.store.files import EXPERTS_FILE, half_is_sound, open_direct, read_header
from fate.store.format import PAGE_BYTES, StoreHeader

_ROOM_BYTES = 1 << 30  # of address space, for the slots that a plan has beyond what is read ahead


class ExpertsAhead:
    """At most `max_bytes` and `max_experts` (as `fate.load` takes them) of `store`. `take` ends the thread and gives
    what is there; `close` ends it too, and nothing is kept.

    No error comes from here: reading ends at one, and who asks for that expert will meet it.
    """

    def __init__(self, store: Path, max_bytes: int, max_experts: str | int | float | None = None) -> None:
        self._store, self._max_bytes, self._max_experts = store, max_bytes, max_experts
        self._slot_bytes = 0
        self._memory: mmap.mmap | None = None
        self._keys: list[ExpertKey] = []
        self._stop = False
        self._thread: threading.Thread | None = None

    def __deepcopy__(self, memo: object) -> ExpertsAhead:
        """transformers copies configurations, and the options of a load are in one."""
        return self

    def __reduce__(self) -> tuple[type[ExpertsAhead], tuple[Path, int]]:
        """And they are pickled, for other processes: there nothing is read ahead."""
        return ExpertsAhead, (self._store, 0)

    def start(self, after: DenseWeights) -> None:
        """Begin to read once the dense weights are in."""
        self._thread = threading.Thread(target=self._run, args=(after,), name="fate-experts-ahead", daemon=True)
        self._thread.start()

    @property
    def resident_bytes(self) -> int:
        """What has become resident because of it."""
        return len(self._keys) * self._slot_bytes

    def take(self, num_bytes: int) -> tuple[mmap.mmap | None, list[ExpertKey]]:
        """Stop (at the end of a read), and hand over the memory and what its slots hold, from the first; (None, [])
        where there is none of `num_bytes`."""
        self._end()
        memory, keys = self._memory, self._keys
        self.close()
        return (memory, keys) if memory is not None and len(memory) >= num_bytes else (None, [])

    def close(self) -> None:
        """Stop, and let go of what was not taken."""
        self._end()
        self._memory, self._keys = None, []

    def _end(self) -> None:
        self._stop = True
        if self._thread is not None:
            self._thread.join()

    def _run(self, after: DenseWeights) -> None:
        after.wait()
        with suppress(FateError, OSError, ValueError):
            self._read()

    def _read(self) -> None:
        file = self._store / EXPERTS_FILE
        header, checksums = read_header(file)
        self._slot_bytes = header.max_record_bytes
        limit = parse_experts(self._max_experts, header.num_records) or header.num_records
        num_slots = min(self._max_bytes // self._slot_bytes, limit)
        if num_slots < 1:
            return
        room = min(self._max_bytes + _ROOM_BYTES, 2 * header.num_records * self._slot_bytes)
        memory = self._memory = slot_memory(room, self._slot_bytes)
        fd, direct = open_direct(file)
        try:
            with memoryview(memory) as view:
                for key in _alike(header):
                    if self._stop or len(self._keys) == num_slots or not direct:
                        return
                    at = len(self._keys) * self._slot_bytes
                    with view[at : at + header.layout(key.layer).record_bytes] as record:
                        if not _read_record(fd, header, checksums, key, record):
                            return
                    self._keys.append(key)
        finally:
            os.close(fd)


def slot_memory(num_bytes: int, slot_bytes: int) -> mmap.mmap:
    """Anonymous memory for slots; its pages become resident when they are first written."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and slot_bytes >= 1 << 20:
        memory.madvise(mmap.MADV_HUGEPAGE)  # fewer TLB misses; refused silently where not configured
    return memory


def _alike(header: StoreHeader) -> Iterator[ExpertKey]:
    """The first expert of each layer, the second of each, and so on."""
    for expert in range(max(layer.num_experts for layer in header.layers)):
        for at, layer in enumerate(header.layers):
            if expert < layer.num_experts:
                yield ExpertKey(at, expert)


def _read_record(fd: int, header: StoreHeader, checksums: bytes, key: ExpertKey, record: memoryview) -> bool:
    """False for what the file does not hold, whole and as it was written."""
    start, done = header.record_offset(*key), 0
    while done < len(record):
        got = os.preadv(fd, [record[done:]], start + done)
        done += got
        if got == 0 or (done < len(record) and got % PAGE_BYTES):
            return False
    index, split = header.record_index(*key), header.layout(key.layer).split
    return half_is_sound(checksums, index, False, record[:split]) and half_is_sound(
        checksums, index, True, record[split:]
    )
