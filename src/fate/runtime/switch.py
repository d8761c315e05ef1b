"""Prefetching switches itself off where measurement shows that it does not pay.

Guesses cost something (asking a gate, a demand that waits for a chunk to end, reads that were wrong) and whether they
gain more depends on machine, model and budget. So they are tried: in pairs of decoding steps one runs with guesses
and one without, in turns (on off off on). What a guess leaves in the cache is what routing then confirmed, so both
kinds of step see the same residency.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, stdev

MIN_PAIRS = 8
MAX_PAIRS = 32
SIGMAS = 2.0  # a difference of so many standard errors decides before MAX_PAIRS
RETRY_STEPS = 2048  # texts change: after so many steps without guesses, or four times as many with them, try again
KEEP_STEPS = 4 * RETRY_STEPS


class PrefetchSwitch:
    """`on`: whether guesses are made now. `announce` is told, in one line, of each decision against them.

    >>> switch = PrefetchSwitch(print)
    >>> for step in range(2 * MIN_PAIRS):
    ...     switch.begin_step()
    ...     switch.end_step(0.020 if switch.on else 0.010)
    prefetching is off: decoding takes 20.00 ms a step with it, 10.00 without (8 pairs of steps)
    """

    def __init__(self, announce: Callable[[str], None], *, trial: bool = True) -> None:
        """trial: false leaves it on for good (to measure prefetching itself)."""
        self.on = True
        self._announce = announce
        self._trial = trial
        self._verdict = True
        self._with: list[float] = []
        self._without: list[float] = []
        self._rest = 0  # steps until the next trial

    def begin_step(self) -> None:
        """A decoding step begins."""
        self.on = self._verdict
        if self._trial and not self._rest:
            pair, second = divmod(len(self._with) + len(self._without), 2)
            self.on = (pair % 2 == 0) != bool(second)

    def begin_prompt(self) -> None:
        """Prompts are not tried: they go by the last verdict on decoding."""
        self.on = self._verdict

    def end_step(self, seconds: float) -> None:
        """The step took so long."""
        if not self._trial:
            return
        if self._rest:
            self._rest -= 1
            return
        (self._with if self.on else self._without).append(seconds)
        if len(self._with) == len(self._without):
            self._judge()

    def _judge(self) -> None:
        """After each whole pair: decide once the difference is clear, or there have been enough."""
        pairs = len(self._with)
        if pairs < MIN_PAIRS:
            return
        lost = [a - b for a, b in zip(self._with, self._without, strict=True)]
        mean, error = fmean(lost), stdev(lost) / math.sqrt(pairs)
        if abs(mean) < SIGMAS * error and pairs < MAX_PAIRS:
            return
        self.on = self._verdict = mean < 0
        self._rest = KEEP_STEPS if self.on else RETRY_STEPS
        if not self.on:
            took, bare = (1000 * fmean(times) for times in (self._with, self._without))
            self._announce(
                f"prefetching is off: decoding takes {took:.2f} ms a step with it, {bare:.2f} without "
                f"({pairs} pairs of steps)"
            )
        self._with.clear()
        self._without.clear()
