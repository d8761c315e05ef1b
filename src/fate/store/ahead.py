"""A store's packed dense weights, read into place by a thread, while Python imports what will compute with them.

They go into one anonymous mapping, past the page cache where the file system allows it, and each is checked against
its checksum as soon as it is there. Without torch: this runs before it is imported.

>>> with DenseWeights(Path("qwen.fate")) as dense:
...     dense.start()
...     import torch
...     for name, packed in dense.matrices():  # waits for the thread; raises what it met
...         ...
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import xxhash

from fate.errors import StoreError, UsageError
from fate.fileio import anonymous_memory, drop_cache
from fate.store.files import PACKED_FILE, check_tensor, open_past_cache, read_checksums
from fate.store.format import PAGE_BYTES, align_up
from fate.store.tensorheader import TensorHeader, TensorHeaderError, read_tensor_header

CHUNK_BYTES = 32 << 20  # a thread that wants the interpreter back while others import waits milliseconds each time


class DenseWeights:
    """`start` reads in a thread, `matrices` gives what was read; `close` stops and joins the thread, what was given
    stays.

    Errors (ChecksumError, StoreError, OSError) come from `matrices`, in the thread that asks for them.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self._places: dict[str, tuple[int, int]] = {}
        self._memory: mmap.mmap | None = None
        self._error: BaseException | None = None
        self._stop = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> DenseWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: object) -> DenseWeights:
        """transformers copies configurations, and the options of a load are in one."""
        return self

    def __reduce__(self) -> tuple[type[DenseWeights], tuple[Path]]:
        """And they are pickled, for other processes: what is read there is read anew."""
        return DenseWeights, (self.store,)

    def start(self) -> None:
        """Begin to read, if that has not begun. Raises UsageError once closed."""
        if self._stop:
            raise UsageError(f"the weights read ahead of {self.store} were let go: read ahead again for another load")
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="fate-dense-weights", daemon=True)
            thread.start()
            self._thread = thread

    def wait(self) -> int:
        """Until what was started has read everything, or has failed; the bytes resident because of it."""
        if self._thread is not None:
            self._thread.join()
        return len(self._memory) if self._memory is not None else 0

    def matrices(self) -> Iterator[tuple[str, memoryview]]:
        """(name, writable bytes) of every matrix, all checked; empty for a store that has none packed."""
        self.start()
        self.wait()
        if self._error is not None:
            raise self._error
        if self._memory is not None:
            view = memoryview(self._memory)
            for name, (start, end) in self._places.items():
                yield name, view[start:end]

    def close(self) -> None:
        """Stop reading (at the end of a chunk) and forget the weights; their memory goes with the last view of it."""
        self._stop = True
        self.wait()
        self._memory = None

    def _run(self) -> None:
        try:
            if (file := self.store / PACKED_FILE).is_file():
                self._read(file)
        except BaseException as error:  # whatever it is, who asks for the weights must get it
            self._error = error

    def _read(self, file: Path) -> None:
        expected = read_checksums(self.store, PACKED_FILE)
        fd, direct = open_past_cache(file)
        try:
            header = _read_header(file)
            first, size = header.data_start, header.data_bytes
            if first + size > os.fstat(fd).st_size:
                raise StoreError(f"{file} is cut short: convert the checkpoint again")
            memory = self._memory = anonymous_memory(max(align_up(size, PAGE_BYTES), PAGE_BYTES))
            with memoryview(memory) as view:
                waiting, done = iter(header.tensors), 0
                tensor = next(waiting, None)
                while tensor is not None and not self._stop:
                    got = os.preadv(fd, [view[done : done + CHUNK_BYTES]], first + done)
                    done += got
                    if got == 0 or (done < size and got % PAGE_BYTES):  # only the file's end cuts a page
                        raise StoreError(f"{file} is cut short: convert the checkpoint again")
                    while tensor is not None and tensor.end <= done:
                        with view[tensor.start : tensor.end] as packed:
                            check_tensor(file, tensor.name, expected.get(tensor.name), xxhash.xxh64_intdigest(packed))
                        self._places[tensor.name] = (tensor.start, tensor.end)
                        tensor = next(waiting, None)
        finally:
            if not direct:
                drop_cache(fd)  # the plan knows one copy
            os.close(fd)


def _read_header(file: Path) -> TensorHeader:
    try:
        header = read_tensor_header(file)
    except TensorHeaderError as error:
        raise StoreError(f"{file} {error}: convert the checkpoint again") from None
    if header.data_start % PAGE_BYTES:  # the writer pads it
        raise StoreError(f"{file} does not begin its data on a page: convert the checkpoint again")
    return header
