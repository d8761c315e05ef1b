"""When everything happened: spans of time that a run notes down as it goes, for plots and for arithmetic about overlap.

>>> timeline = Timeline(max_events=1000)
>>> timeline.add(0.0, 0.002, "stall", layer=3)
>>> timeline.events
[Event(start_s=0.0, end_s=0.002, kind='stall', layer=3, expert=None, num_bytes=0)]
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from fate.core import ExpertKey
from fate.trace.observer import LayerEvent, Observer

# A decoded token of 28 layers leaves some 300 events: enough for about 600 tokens, in some 40 MB.
DEFAULT_MAX_EVENTS = 200_000


@dataclass(frozen=True, slots=True)
class Event:
    """One span. start_s, end_s: seconds of `time.perf_counter`. layer: MoE layer. num_bytes: moved in the span, if any.

    kind is one of
      "layer"     from the routing of a layer being known to its sum
      "compute"   experts' kernels
      "stall"     a layer waits for bytes
      "predict"   the predictor works
      "demand"    the read of an expert that its layer asked for
      "prefetch"  the read of an expert that was prefetched
    """

    start_s: float
    end_s: float
    kind: str
    layer: int
    expert: int | None = None
    num_bytes: int = 0

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


def busy_s(events: Iterable[Event]) -> float:
    """Seconds in which at least one of the events was under way."""
    busy, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start_s):
        busy += max(event.end_s - max(event.start_s, until), 0.0)
        until = max(until, event.end_s)
    return busy


class Timeline(Observer):
    """The first `max_events` events in the order they were added; `dropped` counts those beyond. Any thread may add."""

    def __init__(self, max_events: int = DEFAULT_MAX_EVENTS) -> None:
        self.max_events = max_events
        self.dropped = 0
        self._events: list[Event] = []
        self._lock = threading.Lock()

    def add(
        self, start_s: float, end_s: float, kind: str, layer: int, expert: int | None = None, num_bytes: int = 0
    ) -> None:
        with self._lock:
            if len(self._events) < self.max_events:
                self._events.append(Event(start_s, end_s, kind, layer, expert, num_bytes))
            else:
                self.dropped += 1

    def on_layer(self, event: LayerEvent) -> None:
        layer = event.routing.layer
        for kind, spans in (("predict", (event.predict,)), ("stall", event.stalls), ("compute", event.computes)):
            for span in spans:
                if span is not None:
                    self.add(*span, kind, layer)
        self.add(event.start_s, event.end_s, "layer", layer)

    def on_read(self, key: ExpertKey, kind: str, start_s: float, end_s: float, num_bytes: int) -> None:
        self.add(start_s, end_s, kind, *key, num_bytes)

    @property
    def events(self) -> list[Event]:
        """A copy: the run may go on adding."""
        with self._lock:
            return list(self._events)

    def clear(self) -> None:
        """Forget all events and the count of dropped ones, to note down another run."""
        with self._lock:
            self._events.clear()
            self.dropped = 0
