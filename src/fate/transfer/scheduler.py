"""Who is read next: demand before prefetch, prefetches only on an idle link.

A small pool of threads serves two queues. Demands go first, in order. A prefetch starts only while nothing else is
queued before it or being read, moves in chunks, and steps aside between chunks when a demand arrives. A prefetch that
its layer turns out to need is *upgraded* (it keeps the bytes it has); one that is no longer wanted is *cancelled*.

Torch-free: bytes move through a `Source`, slots are numbers. Residency, and with it that no expert is read twice, is
the caller's business.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fate.core import ExpertKey, Precision
from fate.errors import ClosedError, FateError, TransferError
from fate.fileio import Progress

PREFETCH_CHUNK_BYTES = 1 << 20


class Source(Protocol):
    """Where expert bytes come from (a store on disk, another memory)."""

    def read(self, key: ExpertKey, slot: int, offset: int, length: int, progress: Progress) -> None:
        """Put bytes [offset, offset + length) of the record of `key` at the same offset of `slot`, adding to
        `progress.done` as they arrive; once `progress.stop` is set, return at the end of a chunk, all read or not."""

    def verify(self, key: ExpertKey, slot: int, offset: int, length: int) -> None:
        """Raise ChecksumError unless the bytes just read are those that were written."""

    def close(self) -> None: ...


class State(enum.Enum):
    QUEUED = enum.auto()
    READING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()
    CANCELLED = enum.auto()


@dataclass(eq=False)
class Transfer:
    """One read of bytes [offset, offset + length) of an expert's record into `slot`.

    precision: what the slot holds once this is DONE. demand: a layer waits for it; prefetched_bytes: what was read
    before it did. prefill: it was asked for in a prompt's step. error: why it FAILED.
    """

    key: ExpertKey
    slot: int
    offset: int
    length: int
    precision: Precision = Precision.FULL
    demand: bool = True
    prefill: bool = False
    confidence: float = 1.0
    state: State = State.QUEUED
    prefetched_bytes: int = 0
    metered_bytes: int = 0
    progress: Progress = field(default_factory=lambda: Progress(PREFETCH_CHUNK_BYTES))
    error: BaseException | None = None
    cancel_asked: bool = False

    @property
    def bytes_read(self) -> int:
        return self.progress.done

    @property
    def finished(self) -> bool:
        state = self.state  # compared one by one: an enum's hash takes longer
        return state is State.DONE or state is State.CANCELLED or state is State.FAILED


Meter = Callable[[Transfer, int, int], None]
Listener = Callable[[ExpertKey, str, float, float, int], None]


class TransferScheduler:
    """`workers` threads reading from `source`. All methods may be called from any thread.

    prefetch_cap_bytes bounds the bytes of prefetches that are queued or being read. meter: told of all bytes read
    (transfer, bytes prefetched, bytes demanded), by one thread at a time. listener: told of every read (expert,
    "demand" or "prefetch", start and end in seconds, bytes). An exception in the caller (a KeyboardInterrupt may come
    anywhere) can leave a transfer that nobody waits for; `quiesce` forgets them all.
    """

    def __init__(
        self,
        source: Source,
        *,
        workers: int = 2,
        prefetch_cap_bytes: int = 1 << 62,
        meter: Meter | None = None,
        listener: Listener | None = None,
    ) -> None:
        self._meter = meter
        self._listener = listener
        self._source = source
        self._cap = prefetch_cap_bytes
        self._lock = threading.RLock()  # re-entrant: a finalizer may close us from any allocation
        self._work = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._demands: deque[Transfer] = deque()
        self._prefetches: list[Transfer] = []  # the most confident goes first, of equals the oldest
        self._reading: set[Transfer] = set()  # changed by the worker threads alone
        self._closed = False
        self._busy_s, self._busy_since = 0.0, 0.0  # of the link: at least one read is under way
        self._threads = [
            threading.Thread(target=self._serve, name=f"fate-transfer-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def demand(self, transfer: Transfer) -> None:
        """Queue a read a layer waits for, behind earlier demands and before all prefetches."""
        with self._lock:
            self._check_open()
            transfer.progress.chunk_bytes = transfer.length  # nothing it would step aside for
            self._demands.append(transfer)
            self._step_aside()
            self._wake()

    def prefetch(self, transfer: Transfer) -> bool:
        """Queue a prefetch (`demand` false); False when the byte cap is reached."""
        with self._lock:
            self._check_open()
            prefetches = [*self._prefetches, *(t for t in self._reading if not t.demand)]
            if sum(t.length for t in prefetches) + transfer.length > self._cap:
                return False
            self._prefetches.append(transfer)
            if not self._reading:  # else the thread that reads goes on with it: waking others only costs
                self._work.notify()
            return True

    def upgrade(self, transfer: Transfer) -> int:
        """A layer now waits for this prefetch; returns the bytes it had read as a prefetch."""
        with self._lock:
            if not transfer.demand:
                transfer.demand = True
                transfer.prefetched_bytes = transfer.bytes_read
                if transfer in self._prefetches:
                    self._prefetches.remove(transfer)
                    self._demands.append(transfer)
                    self._wake()
                self._step_aside()
            return transfer.prefetched_bytes

    def cancel(self, transfer: Transfer) -> bool:
        """Give up a transfer. True: its slot is free now. False: a read still writes there; wait for `finished`."""
        with self._lock:
            if transfer.finished:
                return True
            transfer.cancel_asked = transfer.progress.stop = True
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

    def busy_s(self) -> float:
        """Seconds in which at least one read was under way, since the beginning."""
        with self._lock:
            return self._busy_s + (time.perf_counter() - self._busy_since if self._reading else 0.0)

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
            for transfer in self._reading:
                transfer.progress.stop = True
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
        if self._closed or not (self._demands or (self._prefetches and not self._reading)):
            return None
        if self._demands:
            transfer = self._demands.popleft()
        else:
            transfer = max(self._prefetches, key=lambda t: t.confidence)
            self._prefetches.remove(transfer)
        transfer.state = State.READING
        if not self._reading:
            self._busy_since = time.perf_counter()
        self._reading.add(transfer)
        return transfer

    def _read(self, transfer: Transfer) -> None:
        """Read until finished, or until a demand asks a prefetch to step aside."""
        try:
            while transfer.bytes_read < transfer.length:
                at, left = transfer.offset + transfer.bytes_read, transfer.length - transfer.bytes_read
                kind, start, before = "demand" if transfer.demand else "prefetch", time.perf_counter(), at
                self._source.read(transfer.key, transfer.slot, at, left, transfer.progress)
                if self._listener is not None:
                    read = transfer.offset + transfer.bytes_read - before
                    self._listener(transfer.key, kind, start, time.perf_counter(), read)
                with self._lock:
                    if not self._goes_on(transfer):
                        return
            self._source.verify(transfer.key, transfer.slot, transfer.offset, transfer.length)
        except BaseException as error:  # whatever it is, the layer that waits must get it
            transfer.error = error
            return self._finish(transfer, State.FAILED)
        self._finish(transfer, State.DONE)

    def _goes_on(self, transfer: Transfer) -> bool:
        """Account for what was read; False when the transfer was cancelled or steps aside."""
        self._account(transfer)
        if transfer.cancel_asked or self._closed:
            self._finish(transfer, State.CANCELLED)
            return False
        transfer.progress.stop = False
        unfinished = transfer.bytes_read < transfer.length
        if not transfer.demand and unfinished and (self._demands or self._demand_reading()):
            self._leave(transfer)
            transfer.state = State.QUEUED
            self._prefetches.append(transfer)
            return False
        return True

    def _account(self, transfer: Transfer) -> None:
        if self._meter is None:
            return
        read, metered = transfer.bytes_read, transfer.metered_bytes
        prefetched = max(0, (transfer.prefetched_bytes if transfer.demand else read) - metered)
        self._meter(transfer, prefetched, read - metered - prefetched)
        transfer.metered_bytes = read

    def _step_aside(self) -> None:
        """Prefetches that are being read stop at the end of a chunk: a demand has come."""
        for transfer in self._reading:
            if not transfer.demand:
                transfer.progress.stop = True

    def _wake(self) -> None:
        """Another thread, if there is more for one to do than those that read will go on with."""
        if self._demands and len(self._reading) < len(self._threads):
            self._work.notify()

    def _leave(self, transfer: Transfer) -> None:
        """It is no longer being read."""
        self._reading.discard(transfer)
        if not self._reading:
            self._busy_s += time.perf_counter() - self._busy_since

    def _demand_reading(self) -> bool:
        return any(t.demand for t in self._reading)

    def _finish(self, transfer: Transfer, state: State) -> None:
        with self._lock:
            self._leave(transfer)
            transfer.state = state
            if transfer.demand or transfer.cancel_asked:  # nobody waits for a prefetch
                self._done.notify_all()
            self._wake()


def require_done(transfer: Transfer) -> None:
    """Raise unless a finished transfer is DONE: its own typed error, TransferError around any other, ClosedError."""
    if transfer.state is State.DONE:
        return
    if transfer.state is State.CANCELLED:  # only closing cancels what a layer waits for
        raise ClosedError()
    if isinstance(transfer.error, FateError):
        raise transfer.error
    raise TransferError(f"reading {transfer.key} failed: {transfer.error}") from transfer.error
