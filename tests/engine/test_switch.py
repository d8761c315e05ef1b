"""Switching prefetching off by measurement."""

import itertools
import random

import pytest

from fate.engine.switch import MAX_ROUNDS, RETRY_STEPS, PrefetchSwitch


class Clock:
    """Goes on when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


CLOCK = Clock()


def make(announce, **options):
    return PrefetchSwitch(announce, clock=CLOCK, **options)


def run(switch, seconds, steps):
    """`seconds(on)` of each step; returns which steps prefetched."""
    kinds = []
    for _ in range(steps):
        switch.begin_step()
        kinds.append(switch.on)
        CLOCK.now += seconds(switch.on)
        switch.end_step()
    return kinds


def test_a_clear_gain_keeps_it_on_and_says_nothing():
    notes = []
    switch = make(notes.append)
    run(switch, lambda on: 0.10 if on else 0.15, 40)
    assert all(run(switch, lambda on: 0.10, 100))
    assert not notes


def test_a_loss_switches_it_off_with_the_reason_and_it_is_tried_again():
    notes = []
    switch = make(notes.append)
    rng = random.Random(0)
    times = lambda on: (0.103 if on else 0.100) + rng.gauss(0, 0.002)  # noqa: E731
    run(switch, times, 4 * MAX_ROUNDS)
    assert len(notes) == 1
    assert notes[0].startswith("prefetching is off: decoding takes 10")
    assert not any(run(switch, times, RETRY_STEPS // 2))
    switch.begin_prompt()
    assert not switch.on
    assert any(run(switch, times, RETRY_STEPS))


def test_a_drift_does_not_decide():
    """Steps grow slower as a context grows: that is no loss, since a step without stands between two with."""
    clock = itertools.count()
    switch = make(lambda note: pytest.fail(note))
    run(switch, lambda on: (0.1 if on else 0.101) + 1e-4 * next(clock), 4 * MAX_ROUNDS + 4)
    assert switch.on


def test_without_trial_it_stays_on():
    switch = make(lambda note: pytest.fail(note), trial=False)
    assert all(run(switch, lambda on: 1.0 if on else 0.1, 100))


def test_a_reset_tries_again():
    switch = make(lambda note: None)
    run(switch, lambda on: 0.2 if on else 0.1, 20)
    switch.begin_step()
    assert not switch.on
    switch.reset()
    switch.begin_step()
    assert switch.on
