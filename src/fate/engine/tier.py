"""Tiers: a tier of slots as the source of the tier above it.

A tier is slots, a cache, a scheduler and a source. The source of the lowest tier is the disk. `TierSource` makes any
tier the source of the next: what the upper tier reads is leased from the lower one, which reads it from its own source
if it does not hold it. On a machine with a device the upper tier is the device's memory, the lower one the host's.

>>> host = Residency(header, cache, TransferScheduler(DiskSource(reader, pool.view)), precision, accounting, lock)
>>> device = TransferScheduler(TierSource(host, pool.view, device_view))
"""

from __future__ import annotations

from collections.abc import Callable

from fate.core import ExpertKey, Routing
from fate.engine.residency import Residency
from fate.fileio import Progress

View = Callable[[int], memoryview]


class TierSource:
    """`transfer.scheduler.Source` over a lower tier. lower_view, upper_view: writable bytes of a slot of each tier.

    The lower tier's lock must be its own: a transfer thread of the upper tier takes it, while a layer waits for that
    thread under the upper tier's lock. Raises what a lease on the lower tier raises.
    """

    def __init__(self, lower: Residency, lower_view: View, upper_view: View) -> None:
        self._lower = lower
        self._lower_view = lower_view
        self._upper_view = upper_view

    def read(self, key: ExpertKey, slot: int, offset: int, length: int, progress: Progress) -> None:
        """Bytes [offset, offset + length) of the expert's record, once the lower tier holds all of it."""
        lower = self._lower
        with lower.lock, lower.begin(Routing(key.layer, {key.expert: 1})) as lease:
            for group in lease:
                for entry in group:
                    held = self._lower_view(entry.slot)[offset : offset + length]
                    self._upper_view(slot)[offset : offset + length] = held
                    progress.add(length)

    def verify(self, key: ExpertKey, slot: int, offset: int, length: int) -> None:
        """Nothing: the lower tier has verified what it read."""

    def close(self) -> None:
        """The lower tier is its owner's to close."""
