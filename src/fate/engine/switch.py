"""Prefetching switches itself off where measurement shows that it does not pay.

A prefetch costs something: asking a gate, a demand that waits for a chunk to end, reads that were wrong. Whether it
gains more depends on machine, model and budget. So it is tried: of every four decoding steps the third goes without,
and is compared with the steps around it. Nothing else differs between them: both compute by the same calls, and what a
prefetch leaves in the cache is what routing then confirmed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import fmean, stdev

MIN_ROUNDS = 4
MAX_ROUNDS = 24
RETRY_STEPS = 2048  # texts change: after so many steps without prefetching, or four times as many with them, try again
KEEP_STEPS = 4 * RETRY_STEPS


class PrefetchSwitch:
    """`on`: whether prefetches are made now. `announce` is told, in one line, of each decision against them.

    >>> seconds = [0.0]
    >>> switch = PrefetchSwitch(print, clock=lambda: seconds[0])
    >>> for step in range(4 * MIN_ROUNDS):
    ...     switch.begin_step()
    ...     seconds[0] += 0.020 if switch.on else 0.010
    ...     switch.end_step()
    prefetching is off: decoding takes 20.00 ms a step with it, 10.00 without (4 rounds of 4 steps)
    """

    def __init__(
        self,
        announce: Callable[[str], None],
        *,
        trial: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """trial: false leaves it on for good (to measure prefetching itself). clock: seconds."""
        self.announce = announce
        self._trial = trial
        self.clock = clock
        self.reset()

    def reset(self) -> None:
        """Try again: what was measured was another machine, so to say."""
        self.on = self._verdict = True
        self._began_s = self.clock()
        self._round: list[float] = []  # seconds of its steps: with, with, without, with
        self._with: list[float] = []  # of whole rounds
        self._without: list[float] = []
        self._rest = 0  # steps until the next trial

    def begin_step(self) -> None:
        """A decoding step begins."""
        self._began_s = self.clock()
        self.on = self._verdict
        if self._trial and not self._rest:
            self.on = len(self._round) != 2

    def begin_prompt(self) -> None:
        """Prompts are not tried: they go by the last verdict on decoding."""
        self.on = self._verdict

    def end_step(self) -> None:
        """The decoding step has ended."""
        if not self._trial:
            return
        seconds = self.clock() - self._began_s
        if self._rest:
            self._rest -= 1
            return
        self._round.append(seconds)
        if len(self._round) == 4:
            _, before, without, after = self._round
            self._with.append((before + after) / 2)
            self._without.append(without)
            self._round.clear()
            self._judge()

    def _judge(self) -> None:
        """After each round: decide once the difference is clear, or there have been enough."""
        rounds = len(self._with)
        if rounds < MIN_ROUNDS:
            return
        lost = [a - b for a, b in zip(self._with, self._without, strict=True)]
        mean, error = fmean(lost), stdev(lost) / math.sqrt(rounds)
        if abs(mean) < _standard_errors(rounds) * error and rounds < MAX_ROUNDS:
            return
        self.on = self._verdict = mean < 0
        self._rest = KEEP_STEPS if self.on else RETRY_STEPS
        if not self.on:
            took, bare = (1000 * fmean(times) for times in (self._with, self._without))
            self.announce(
                f"prefetching is off: decoding takes {took:.2f} ms a step with it, {bare:.2f} without "
                f"({rounds} rounds of 4 steps)"
            )
        self._with.clear()
        self._without.clear()


def _standard_errors(rounds: int) -> float:
    """What difference decides: a clear one after few rounds, a doubtful one after many."""
    return 2.0 + 4.0 * MIN_ROUNDS / rounds if rounds < 4 * MIN_ROUNDS else 2.0
