"""The seam for watching a run: who is told of every layer, and of every read.

`Timeline`, `Recorder` and the explanation of a run implement it.
"""

from __future__ import annotations

from dataclasses import dataclass

from fate.core import ExpertKey, Routing, StepStats


@dataclass(frozen=True)
class LayerEvent:
    """One use of a layer's experts. start_s, end_s: from its routing to its sum, seconds of `time.perf_counter`.

    computes, stalls: spans in which experts were computed, and in which the layer waited for bytes. predict: when the
    predictor worked, if it did. stats: the layer's counters of its phase so far, this use included.
    """

    routing: Routing
    start_s: float
    end_s: float
    computes: tuple[tuple[float, float], ...]
    stalls: tuple[tuple[float, float], ...]
    predict: tuple[float, float] | None
    stats: StepStats


class Observer:
    """Somebody who is told what happens. Any method may be left as it is."""

    def on_request(self) -> None:
        """A new sequence starts with the next layer event."""

    def on_layer(self, event: LayerEvent) -> None:
        """A layer's experts were used; called under the engine's lock, after its counters were updated."""

    def on_read(self, key: ExpertKey, kind: str, start_s: float, end_s: float, num_bytes: int) -> None:
        """A transfer thread has read bytes of an expert. kind: "demand" or "prefetch"."""
