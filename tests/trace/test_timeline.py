"""The timeline keeps what it has room for and counts the rest, whoever adds."""

import threading

from fate.trace import Event, Timeline
from fate.trace.timeline import busy_s


def test_events_in_the_order_they_were_added():
    timeline = Timeline()
    timeline.add(1.0, 3.0, "stall", 4)
    timeline.add(0.0, 1.0, "demand", 4, expert=7, num_bytes=100)
    assert timeline.events == [Event(1.0, 3.0, "stall", 4), Event(0.0, 1.0, "demand", 4, 7, 100)]
    assert timeline.events[0].duration_s == 2.0


def test_what_exceeds_the_bound_is_counted():
    timeline = Timeline(max_events=2)
    for at in range(5):
        timeline.add(at, at + 1, "compute", 0)
    assert [event.start_s for event in timeline.events] == [0, 1]
    assert timeline.dropped == 3
    timeline.clear()
    assert (timeline.events, timeline.dropped) == ([], 0)


def test_a_reader_has_its_own_list():
    timeline = Timeline()
    timeline.events.append(Event(0, 1, "compute", 0))
    assert timeline.events == []


def test_every_thread_may_add():
    timeline = Timeline(max_events=3000)
    threads = [
        threading.Thread(target=lambda: [timeline.add(0, 1, "prefetch", 0) for _ in range(1000)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(timeline.events) == 3000
    assert timeline.dropped == 1000


def test_overlapping_events_are_counted_once():
    events = [Event(3.0, 4.0, "demand", 0), Event(-1.0, 1.0, "demand", 0), Event(0.5, 2.0, "prefetch", 0)]
    assert busy_s(events) == 4.0
    assert busy_s([]) == 0.0
