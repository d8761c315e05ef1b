"""Who is read next: demand before prefetch, guesses only on an idle link.

A small pool of threads serves two queues. Demands go first, in order. A prefetch starts only while no demand is
queued or being read, moves in chunks, and steps aside between chunks when a demand arrives. A prefetch that its layer
turns out to need is *upgraded* (it keeps the bytes it has); one that is no longer wanted is *cancelled*.

Torch-free: bytes move through a `Source`, slots are numbers. Residency, and with it that no expert is read twice, is
the caller's business.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fate.core import ExpertKey, Precision
from fate.errors import ClosedError, FateError, TransferError

PREFETCH_CHUNK_BYTES = 1 << 20


class Source(Protocol):
    """Where expert bytes come from (a store on disk, another memory)."""

    def read(self, key: ExpertKey, slot: int, offset: int, length: int) -> None:
        """Put bytes [offset, offset + length) of the record of `key` at the same offset of `slot`."""

    def verify(self, key: ExpertKey, slot: int, offset: int, length: int) -> None:
        """Raise ChecksumError unless the bytes just read are those that were written."""

    def close(self) -> None: ...


class State(enum.Enum):
    QUEUED = enum.auto()
    READING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()
    CANCELLED = enum.auto()


_FINISHED = frozenset({State.DONE, State.FAILED, State.CANCELLED})


@dataclass(eq=False)
class Transfer:
    """One read of bytes [offset, offset + length) of an expert's record into `slot`.

    precision: what the slot holds once this is DONE. demand: a layer waits for it. error: why it FAILED.
    """

    key: ExpertKey
    slot: int
    offset: int
    length: int
    precision: Precision = Precision.FULL
    demand: bool = True
    confidence: float = 1.0
    state: State = State.QUEUED
    bytes_read: int = 0
    error: BaseException | None = None
    cancel_asked: bool = False

    @property
    def finished(self) -> bool:
        return self.state in _FINISHED


@dataclass
class TransferStats:
    """Bytes read so far, by the priority they were read at."""

    demand_bytes: int = 0
    prefetch_bytes: int = 0


class TransferScheduler:
    """`workers` threads reading from `source`. All methods may be called from any thread.

    prefetch_cap_bytes bounds the bytes of prefetches that are queued or being read. An exception in the caller (a
    KeyboardInterrupt may come anywhere) can leave a transfer that nobody waits for; `quiesce` forgets them all.
    """

    def __init__(self, source: Source, *, workers: int = 2, prefetch_cap_bytes: int = 1 << 62) -> None:
        self.stats = TransferStats()
        self._source = source
        self._cap = prefetch_cap_bytes
        self._lock = threading.RLock()  # re-entrant: a finalizer may close us from any allocation
        self._work = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._demands: deque[Transfer] = deque()
        self._prefetches: list[Transfer] = []  # most confident last
        self._reading: set[Transfer] = set()  # changed by the worker threads alone
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"fate-transfer-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def demand(self, transfer: Transfer) -> None:
        """Queue a read a layer waits for, behind earlier demands and before all prefetches."""
        with self._lock:
            self._check_open()
            self._demands.append(transfer)
            self._work.notify()

    def prefetch(self, transfer: Transfer) -> bool:
        """Queue a guess (`demand` false); False when the byte cap is reached."""
        with self._lock:
            self._check_open()
            guesses = [*self._prefetches, *(t for t in self._reading if not t.demand)]
            if sum(t.length for t in guesses) + transfer.length > self._cap:
                return False
            self._prefetches.append(transfer)
            self._prefetches.sort(key=lambda t: t.confidence)
            self._work.notify()
            return True

    def upgrade(self, transfer: Transfer) -> int:
        """A layer now waits for this prefetch; returns the bytes it had read as a guess."""
        with self._lock:
            if not transfer.demand:
                transfer.demand = True
                if transfer in self._prefetches:
                    self._prefetches.remove(transfer)
                    self._demands.append(transfer)
                    self._work.notify()
            return transfer.bytes_read

    def cancel(self, transfer: Transfer) -> bool:
        """Give up a transfer. True: its slot is free now. False: a read still writes there; wait for `finished`."""
        with self._lock:
            if transfer.finished:
                return True
            transfer.cancel_asked = True
            if transfer in self._reading:
                return False
            for queue in (self._prefetches, self._demands):
                if transfer in queue:
                    queue.remove(transfer)
            transfer.state = State.CANCELLED
            return True

    def wait_any(self, transfers: Sequence[Transfer]) -> float:
        """Block until one has finished, however it ended; returns the seconds waited.

        Raises ClosedError, or TransferError when the threads are gone (a forked process has none).
        """
        assert transfers, "waiting for nothing would last for ever"
        start = time.perf_counter()
        with self._lock:
            while not any(t.finished for t in transfers):
                self._check_open()
                self._wait_done()
        return time.perf_counter() - start

    def quiesce(self) -> None:
        """Forget every transfer; returns when no read writes to any slot."""
        with self._lock:
            for transfer in (*self._demands, *self._prefetches, *self._reading):
                self.cancel(transfer)
            while self._reading:
                self._check_open()
                self._wait_done()

    def close(self) -> None:
        """Stop the threads (each finishes at most the read it is in) and the source. May be called twice."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
            self._done.notify_all()
        if threading.current_thread() in self._threads:  # a finalizer may run in one of them, even under the lock
            threading.Thread(target=self._join, name="fate-transfer-close").start()
        else:
            self._join()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()
        self._source.close()

    def _wait_done(self) -> None:
        self._done.wait(timeout=0.5)
        if not self._closed and not any(thread.is_alive() for thread in self._threads):
            raise TransferError("the transfer threads are gone: load the model in the process that uses it")

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError()

    def _serve(self) -> None:
        while True:
            with self._lock:
                while (transfer := self._take()) is None:
                    if self._closed:
                        return
                    self._work.wait()
            self._read(transfer)

    def _take(self) -> Transfer | None:
        """The next transfer to read, now marked as being read; None: nothing may start."""
        if self._closed or not (self._demands or self._prefetches):
            return None
        if (not self._demands and self._demand_reading()) or self._closed:
            return None
        transfer = self._demands.popleft() if self._demands else self._prefetches.pop()
        transfer.state = State.READING
        self._reading.add(transfer)
        return transfer

    def _read(self, transfer: Transfer) -> None:
        """Read until finished, or until a demand asks a prefetch to step aside."""
        try:
            while transfer.bytes_read < transfer.length:
                left = transfer.length - transfer.bytes_read
                chunk = left if transfer.demand else min(left, PREFETCH_CHUNK_BYTES)
                self._source.read(transfer.key, transfer.slot, transfer.offset + transfer.bytes_read, chunk)
                with self._lock:
                    if not self._goes_on(transfer, chunk):
                        return
            self._source.verify(transfer.key, transfer.slot, transfer.offset, transfer.length)
        except BaseException as error:  # whatever it is, the layer that waits must get it
            transfer.error = error
            return self._finish(transfer, State.FAILED)
        self._finish(transfer, State.DONE)

    def _goes_on(self, transfer: Transfer, chunk: int) -> bool:
        """Account for a chunk; False when the transfer was cancelled or steps aside."""
        transfer.bytes_read += chunk
        if transfer.demand:
            self.stats.demand_bytes += chunk
        else:
            self.stats.prefetch_bytes += chunk
        if transfer.cancel_asked or self._closed:
            self._finish(transfer, State.CANCELLED)
            return False
        unfinished = transfer.bytes_read < transfer.length
        if not transfer.demand and unfinished and (self._demands or self._demand_reading()):
            self._reading.discard(transfer)
            transfer.state = State.QUEUED
            self._prefetches.append(transfer)
            return False
        return True

    def _demand_reading(self) -> bool:
        return any(t.demand for t in self._reading)

    def _finish(self, transfer: Transfer, state: State) -> None:
        with self._lock:
            self._reading.discard(transfer)
            transfer.state = state
            self._done.notify_all()
            self._work.notify_all()  # an idle link may start a prefetch


def require_done(transfer: Transfer) -> None:
    """Raise unless a finished transfer is DONE: its own typed error, TransferError around any other, ClosedError."""
    if transfer.state is State.DONE:
        return
    if transfer.state is State.CANCELLED:  # only closing cancels what a layer waits for
        raise ClosedError()
    if isinstance(transfer.error, FateError):
        raise transfer.error
    raise TransferError(f"reading {transfer.key} failed: {transfer.error}") from transfer.error
