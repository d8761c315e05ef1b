"""Transfer order, upgrades, cancellation and failure, with a source whose pace the test sets."""

import threading
import time

import pytest

from fate.core import ExpertKey
from fate.errors import ChecksumError, ClosedError, TransferError
from fate.transfer.scheduler import PREFETCH_CHUNK_BYTES, State, TransferScheduler, raise_if_failed


class GatedSource:
    """Reads wait for `permit()`; `log` holds (key, offset, length) in the order they started."""

    def __init__(self, error=None, verify_error=None):
        self.log = []
        self.error = error
        self.verify_error = verify_error
        self.closed = False
        self._permits = threading.Semaphore(0)
        self.started = threading.Semaphore(0)

    def permit(self, count=1000):
        self._permits.release(count)

    def read(self, key, slot, offset, length):
        self.log.append((key, offset, length))
        self.started.release()
        assert self._permits.acquire(timeout=10)
        if self.error is not None:
            raise self.error

    def verify(self, key, slot, offset, length):
        if self.verify_error is not None:
            raise self.verify_error

    def close(self):
        self.closed = True


def key(expert):
    return ExpertKey(0, expert)


@pytest.fixture
def make(request):
    made = []

    def build(workers=1, **kwargs):
        source = GatedSource(**kwargs)
        scheduler = TransferScheduler(source, workers=workers)
        made.append((source, scheduler))
        return source, scheduler

    yield build
    for source, scheduler in made:
        source.permit()
        scheduler.close()


def finish(source, scheduler, *transfers):
    source.permit()
    for transfer in transfers:
        while not transfer.finished:
            scheduler.wait_any([transfer])


def test_demand_overtakes_queued_prefetches(make):
    source, scheduler = make()
    first = scheduler.demand(key(0), 0, 0, 10)
    source.started.acquire()
    guess = scheduler.prefetch(key(1), 1, 0, 10, confidence=0.9)
    demand = scheduler.demand(key(2), 2, 0, 10)
    finish(source, scheduler, first, guess, demand)
    assert [k.expert for k, _, _ in source.log] == [0, 2, 1]


def test_prefetches_go_by_confidence(make):
    source, scheduler = make()
    blocker = scheduler.demand(key(0), 0, 0, 10)
    source.started.acquire()
    guesses = [scheduler.prefetch(key(e), e, 0, 10, confidence=c) for e, c in ((1, 0.2), (2, 0.9), (3, 0.5))]
    finish(source, scheduler, blocker, *guesses)
    assert [k.expert for k, _, _ in source.log] == [0, 2, 3, 1]


def test_no_prefetch_starts_while_a_demand_is_read(make):
    source, scheduler = make(workers=2)
    demand = scheduler.demand(key(0), 0, 0, 10)
    source.started.acquire()
    guess = scheduler.prefetch(key(1), 1, 0, 10, confidence=0.9)
    time.sleep(0.05)
    assert guess.state is State.QUEUED, "the second worker must leave the link to the demand"
    finish(source, scheduler, demand, guess)


def test_a_prefetch_steps_aside_between_chunks(make):
    source, scheduler = make()
    guess = scheduler.prefetch(key(1), 1, 0, 3 * PREFETCH_CHUNK_BYTES, confidence=0.9)
    source.started.acquire()
    demand = scheduler.demand(key(2), 2, 0, 10)
    finish(source, scheduler, demand, guess)
    assert [(k.expert, offset) for k, offset, _ in source.log] == [
        (1, 0),
        (2, 0),
        (1, PREFETCH_CHUNK_BYTES),
        (1, 2 * PREFETCH_CHUNK_BYTES),
    ]


def test_a_prefetch_in_flight_is_upgraded_not_repeated(make):
    source, scheduler = make()
    guess = scheduler.prefetch(key(1), 1, 0, 2 * PREFETCH_CHUNK_BYTES, confidence=0.9)
    source.started.acquire()
    demand = scheduler.demand(key(1), 7, 0, 2 * PREFETCH_CHUNK_BYTES)
    assert demand is guess
    finish(source, scheduler, guess)
    assert source.log == [(key(1), 0, PREFETCH_CHUNK_BYTES), (key(1), PREFETCH_CHUNK_BYTES, PREFETCH_CHUNK_BYTES)]
    assert scheduler.stats.demand_bytes + scheduler.stats.prefetch_bytes == 2 * PREFETCH_CHUNK_BYTES


def test_the_same_guess_is_read_once(make):
    source, scheduler = make()
    guess = scheduler.prefetch(key(1), 1, 0, 10, confidence=0.9)
    assert scheduler.prefetch(key(1), 2, 0, 10, confidence=0.9) is None
    finish(source, scheduler, guess)
    assert len(source.log) == 1


def test_cancelled_before_it_starts_reads_nothing(make):
    source, scheduler = make()
    blocker = scheduler.demand(key(0), 0, 0, 10)
    source.started.acquire()
    guess = scheduler.prefetch(key(1), 1, 0, 10, confidence=0.9)
    assert scheduler.cancel(guess)
    assert guess.state is State.CANCELLED
    finish(source, scheduler, blocker)
    assert [k.expert for k, _, _ in source.log] == [0]


def test_cancelled_while_reading_stops_at_the_next_chunk(make):
    source, scheduler = make()
    guess = scheduler.prefetch(key(1), 1, 0, 5 * PREFETCH_CHUNK_BYTES, confidence=0.9)
    source.started.acquire()
    assert not scheduler.cancel(guess), "its slot is still being written"
    again = scheduler.demand(key(1), 3, 0, 10)
    assert again is not guess
    finish(source, scheduler, guess, again)
    assert guess.state is State.CANCELLED
    assert guess.bytes_read == PREFETCH_CHUNK_BYTES
    assert again.state is State.DONE


def test_byte_cap():
    source = GatedSource()
    scheduler = TransferScheduler(source, workers=1, prefetch_cap_bytes=25)
    try:
        assert scheduler.prefetch(key(1), 1, 0, 20, confidence=0.9) is not None
        assert scheduler.prefetch(key(2), 2, 0, 20, confidence=0.9) is None
    finally:
        source.permit()
        scheduler.close()


def test_a_failure_reaches_the_waiter_typed(make):
    source, scheduler = make(error=OSError(5, "Input/output error"))
    transfer = scheduler.demand(key(3), 0, 0, 10)
    finish(source, scheduler, transfer)
    with pytest.raises(TransferError, match=r"layer 0 expert 3 failed: .*Input/output error"):
        raise_if_failed(transfer)


def test_a_typed_failure_stays_what_it_is(make):
    source, scheduler = make(verify_error=ChecksumError("damaged"))
    transfer = scheduler.demand(key(3), 0, 0, 10)
    finish(source, scheduler, transfer)
    with pytest.raises(ChecksumError, match="damaged"):
        raise_if_failed(transfer)
    assert scheduler.demand(key(4), 0, 0, 10) is not None, "the thread lives on"


def test_close_stops_every_thread_and_is_repeatable(make):
    source, scheduler = make(workers=3)
    threads = list(scheduler._threads)
    scheduler.demand(key(0), 0, 0, 10)
    source.started.acquire()
    closer = threading.Thread(target=scheduler.close)
    closer.start()
    source.permit()
    closer.join(timeout=5)
    assert not closer.is_alive()
    assert not any(thread.is_alive() for thread in threads)
    assert source.closed
    scheduler.close()
    with pytest.raises(ClosedError):
        scheduler.demand(key(1), 0, 0, 10)
