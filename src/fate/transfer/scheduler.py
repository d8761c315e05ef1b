"""Who is read next: demand before prefetch, each expert once, guesses only on an idle link.

A small pool of threads serves two queues. Demands go first, in order. A prefetch starts only while no demand is
queued or being read, moves in chunks, and steps aside between chunks when a demand arrives. A prefetch that its layer
turns out to need is *upgraded* (it keeps the bytes it has); one that is no longer wanted is *cancelled*.

Torch-free: bytes move through a `Source`, slots are numbers. Residency is the caller's business.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from fate.core import ExpertKey
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
    """One read of bytes [offset, offset + length) of an expert's record into `slot`."""

    key: ExpertKey
    slot: int
    offset: int
    length: int
    demand: bool
    confidence: float = 1.0
    state: State = State.QUEUED
    bytes_read: int = 0
    error: BaseException | None = None
    cancel_asked: bool = field(default=False, repr=False)

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

    prefetch_cap_bytes bounds the bytes of prefetches that are queued or being read.
    """

    def __init__(self, source: Source, *, workers: int = 2, prefetch_cap_bytes: int = 1 << 62) -> None:
        self.stats = TransferStats()
        self._source = source
        self._cap = prefetch_cap_bytes
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._demands: deque[Transfer] = deque()
        self._prefetches: list[Transfer] = []  # most confident last
        self._active: dict[ExpertKey, Transfer] = {}
        self._demands_reading = 0
        self._prefetch_bytes_open = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"fate-transfer-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def demand(self, key: ExpertKey, slot: int, offset: int, length: int) -> Transfer:
        """Queue a read a layer waits for; a transfer of `key` under way is upgraded and returned instead."""
        with self._lock:
            self._check_open()
            active = self._active.get(key)
            if active is not None and not active.cancel_asked:
                self._upgrade(active)
                return active
            transfer = Transfer(key, slot, offset, length, demand=True)
            self._active[key] = transfer
            self._demands.append(transfer)
            self._work.notify()
            return transfer

    def prefetch(self, key: ExpertKey, slot: int, offset: int, length: int, confidence: float) -> Transfer | None:
        """Queue a guess; None when `key` is under way already or the byte cap is reached."""
        with self._lock:
            self._check_open()
            if key in self._active or self._prefetch_bytes_open + length > self._cap:
                return None
            transfer = Transfer(key, slot, offset, length, demand=False, confidence=confidence)
            self._active[key] = transfer
            self._prefetch_bytes_open += length
            self._prefetches.append(transfer)
            self._prefetches.sort(key=lambda t: t.confidence)
            self._work.notify()
            return transfer

    def upgrade(self, transfer: Transfer) -> None:
        """A layer now waits for this prefetch."""
        with self._lock:
            self._upgrade(transfer)

    def cancel(self, transfer: Transfer) -> bool:
        """Give up a prefetch. True: its slot is free now. False: a read still writes there; wait for `finished`."""
        with self._lock:
            if transfer.finished:
                return True
            transfer.cancel_asked = True
            if transfer in self._prefetches:
                self._prefetches.remove(transfer)
                self._finish(transfer, State.CANCELLED)
                return True
            return False

    def wait_any(self, transfers: Iterable[Transfer]) -> float:
        """Block until one has finished, however it ended; returns the seconds waited."""
        pending = list(transfers)
        start = time.perf_counter()
        with self._lock:
            while not any(t.finished for t in pending):
                self._check_open()
                self._done.wait(timeout=0.5)
        return time.perf_counter() - start

    def close(self) -> None:
        """Stop the threads (each finishes at most the read it is in) and the source. May be called twice."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
            self._done.notify_all()
        for thread in self._threads:
            thread.join()
        self._source.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError()

    def _upgrade(self, transfer: Transfer) -> None:
        if transfer.finished or transfer.demand:
            return
        transfer.demand = True
        self._prefetch_bytes_open -= transfer.length
        if transfer.state is State.READING:
            self._demands_reading += 1
        else:
            self._prefetches.remove(transfer)
            self._demands.append(transfer)
            self._work.notify()

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
        if self._closed:
            return None
        if self._demands:
            transfer = self._demands.popleft()
            self._demands_reading += 1
        elif self._prefetches and not self._demands_reading:
            transfer = self._prefetches.pop()
        else:
            return None
        transfer.state = State.READING
        return transfer

    def _read(self, transfer: Transfer) -> None:
        """Read until finished, or until a demand asks a prefetch to step aside."""
        try:
            while transfer.bytes_read < transfer.length:
                left = transfer.length - transfer.bytes_read
                chunk = left if transfer.demand else min(left, PREFETCH_CHUNK_BYTES)
                self._source.read(transfer.key, transfer.slot, transfer.offset + transfer.bytes_read, chunk)
                with self._lock:
                    transfer.bytes_read += chunk
                    if transfer.demand:
                        self.stats.demand_bytes += chunk
                    else:
                        self.stats.prefetch_bytes += chunk
                    if transfer.cancel_asked or self._closed:
                        return self._finish(transfer, State.CANCELLED)
                    if not transfer.demand and transfer.bytes_read < transfer.length and self._demand_pending():
                        transfer.state = State.QUEUED
                        self._prefetches.append(transfer)
                        return
            self._source.verify(transfer.key, transfer.slot, transfer.offset, transfer.length)
        except BaseException as error:  # whatever it is, the layer that waits must get it
            transfer.error = error
            with self._lock:
                return self._finish(transfer, State.FAILED)
        with self._lock:
            self._finish(transfer, State.DONE)

    def _demand_pending(self) -> bool:
        return bool(self._demands) or self._demands_reading > 0

    def _finish(self, transfer: Transfer, state: State) -> None:
        if transfer.demand:
            if transfer.state is State.READING:
                self._demands_reading -= 1
        else:
            self._prefetch_bytes_open -= transfer.length
        transfer.state = state
        if self._active.get(transfer.key) is transfer:
            del self._active[transfer.key]
        self._done.notify_all()
        self._work.notify_all()  # an idle link may start a prefetch


def raise_if_failed(transfer: Transfer) -> None:
    """Raise the typed error of a failed transfer: its own if it has one, TransferError around anything else."""
    if transfer.state is not State.FAILED:
        return
    if isinstance(transfer.error, FateError):
        raise transfer.error
    raise TransferError(f"reading {transfer.key} failed: {transfer.error}") from transfer.error
