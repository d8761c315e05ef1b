"""The speed of a link between two memories, and the clock that keeps it: one transfer carried after the other. Without
torch.

>>> link = Link(1000.0)
>>> link.book(500, now=10.0), link.book(500, now=10.0)  # the second waits for the first
(10.5, 11.0)
"""

from __future__ import annotations

import threading

# A link has a queue, so the next transfer starts when the last one ends, not when a thread has noticed that. What
# comes within HANDOFF_S of the notice starts as if it had been queued, but never more than MAX_LATE_S in the past.
HANDOFF_S = 150e-6
MAX_LATE_S = 2e-3


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
