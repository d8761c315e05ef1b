"""One forward, from the model's call to its end.

`Steps` begins a step when the model is called and ends it when the model returns; layers ask it, in between, what kind
of step this is. The forward itself is transformers' loop over decoder layers:

    begin    refuse what the plan does not cover; build native calls anew if somebody changed the model
    layer    attention and routing                                  native call 1 (models/decode/layer.py)
             lease: pin resident experts, demand missing ones       engine/residency.py
             predict and prefetch for later layers                  engine/prefetch.py
             experts as they arrive, shared expert, sum             native call 2 (engine/experts.py)
    end      count time; compare steps with and without prefetching (engine/switch.py)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from fate.core import Span, StepStats

Clock = Callable[[], float]


class CurrentStep(threading.local):
    """The step under way in this thread.

    spans: which rows belong to which sequence. native: whether layers may go by native calls. calls: by the rotation of
    a layer, the angles that one of this step was called with, and how many arguments.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self.lock = lock
        self.spans: tuple[Span, ...] = ()
        self.native = False
        self.calls: dict[object, tuple[object, int]] = {}
        self.began_s: float | None = None

    @property
    def prefill(self) -> bool:
        """Whether some rows are a prompt's."""
        return any(span.prompt for span in self.spans)


@dataclass
class PhaseTimes:
    """What belongs to no layer, of prompts and of decoding: tokens, forwards, seconds."""

    prefill: StepStats
    decode: StepStats

    @classmethod
    def zero(cls) -> PhaseTimes:
        return cls(StepStats(), StepStats())

    def add(self, prefill: bool, tokens: int, seconds: float) -> None:
        counted = StepStats(tokens=tokens, forwards=1, total_s=seconds)
        if prefill:
            self.prefill += counted
        else:
            self.decode += counted


class Steps:
    """Begins and ends the steps of one model, each in the thread that called it."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.lock = threading.RLock()
        self.current = CurrentStep(self.lock)
        self.times = PhaseTimes.zero()
        self._clock = clock

    def begin(self, spans: tuple[Span, ...], *, native: bool) -> None:
        if self.current.began_s is not None:  # of a forward that raised: its tokens count, its time is lost
            self.times.add(self.current.prefill, sum(span.rows for span in self.current.spans), 0.0)
        self.current.spans, self.current.native, self.current.calls = spans, native, {}
        self.current.began_s = self._clock()

    def end(self) -> bool:
        """The model has returned; whether this was a step that had begun."""
        began_s, self.current.began_s = self.current.began_s, None
        if began_s is None:
            return False
        self.current.native = False
        rows = sum(span.rows for span in self.current.spans)
        self.times.add(self.current.prefill, rows, self._clock() - began_s)
        return True
