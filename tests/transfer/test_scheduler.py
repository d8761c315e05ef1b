"""Transfer order, upgrades, cancellation and failure, with a source whose pace the test sets."""

import threading
import time

import pytest

from fate.core import ExpertKey
from fate.errors import ChecksumError, ClosedError, TransferError
from fate.transfer.scheduler import PREFETCH_CHUNK_BYTES, State, Transfer, TransferScheduler, require_done


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

    def read(self, key, slot, offset, length, progress):
        for at in range(offset, offset + length, progress.chunk_bytes):
            size = min(progress.chunk_bytes, offset + length - at)
            self.log.append((key, at, size))
            self.started.release()
            assert self._permits.acquire(timeout=10)
            if self.error is not None:
                raise self.error
            progress.add(size)
            if progress.stop:
                return

    def verify(self, key, slot, offset, length):
        if self.verify_error is not None:
            raise self.verify_error

    def close(self):
        self.closed = True


def transfer_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("fate-transfer-")}


def key(expert):
    return ExpertKey(0, expert)


@pytest.fixture
def make(request):
    made = []

    def build(workers=1, meter=None, **kwargs):
        source = GatedSource(**kwargs)
        scheduler = TransferScheduler(source, workers=workers, meter=meter)
        made.append((source, scheduler))
        return source, scheduler

    yield build
    for source, scheduler in made:
        source.permit()
        scheduler.close()


def demand(scheduler, expert, length=10):
    transfer = Transfer(key(expert), expert, 0, length)
    scheduler.demand(transfer)
    return transfer


def prefetch(scheduler, expert, length=10, confidence=0.9):
    transfer = Transfer(key(expert), expert, 0, length, demand=False, confidence=confidence)
    return transfer if scheduler.prefetch(transfer) else None


def finish(source, scheduler, *transfers):
    source.permit()
    for transfer in transfers:
        while not transfer.finished:
            scheduler.wait_any([transfer])


def test_demand_overtakes_queued_prefetches(make):
    source, scheduler = make()
    first = demand(scheduler, 0, 10)
    source.started.acquire()
    guess = prefetch(scheduler, 1, 10, 0.9)
    needed = demand(scheduler, 2, 10)
    finish(source, scheduler, first, guess, needed)
    assert [k.expert for k, _, _ in source.log] == [0, 2, 1]


def test_prefetches_go_by_confidence(make):
    source, scheduler = make()
    blocker = demand(scheduler, 0, 10)
    source.started.acquire()
    guesses = [prefetch(scheduler, e, 10, c) for e, c in ((1, 0.2), (2, 0.9), (3, 0.5))]
    finish(source, scheduler, blocker, *guesses)
    assert [k.expert for k, _, _ in source.log] == [0, 2, 3, 1]


def test_no_prefetch_starts_while_a_demand_is_read(make):
    source, scheduler = make(workers=2)
    needed = demand(scheduler, 0, 10)
    source.started.acquire()
    guess = prefetch(scheduler, 1, 10, 0.9)
    time.sleep(0.05)
    assert guess.state is State.QUEUED, "the second worker must leave the link to the demand"
    finish(source, scheduler, needed, guess)


def test_a_prefetch_steps_aside_between_chunks(make):
    source, scheduler = make()
    guess = prefetch(scheduler, 1, 3 * PREFETCH_CHUNK_BYTES, 0.9)
    source.started.acquire()
    needed = demand(scheduler, 2, 10)
    finish(source, scheduler, needed, guess)
    assert [(k.expert, offset) for k, offset, _ in source.log] == [
        (1, 0),
        (2, 0),
        (1, PREFETCH_CHUNK_BYTES),
        (1, 2 * PREFETCH_CHUNK_BYTES),
    ]


def test_a_prefetch_in_flight_is_upgraded_not_repeated(make):
    metered = []
    source, scheduler = make(meter=lambda transfer, *sizes: metered.append(sizes))
    guess = prefetch(scheduler, 1, 2 * PREFETCH_CHUNK_BYTES)
    source.started.acquire()
    assert scheduler.upgrade(guess) == 0
    other = demand(scheduler, 2)
    finish(source, scheduler, guess, other)
    expected = [(1, 0, PREFETCH_CHUNK_BYTES), (1, PREFETCH_CHUNK_BYTES, PREFETCH_CHUNK_BYTES), (2, 0, 10)]
    assert [(k.expert, offset, length) for k, offset, length in source.log] == expected, (
        "it does not step aside any more"
    )
    guessed, demanded = map(sum, zip(*metered))
    assert (guessed, demanded) == (0, 2 * PREFETCH_CHUNK_BYTES + 10)


def test_a_queued_prefetch_is_upgraded_in_order(make):
    source, scheduler = make()
    first = demand(scheduler, 0)
    source.started.acquire()
    guesses = [prefetch(scheduler, 1, 10, 0.9), prefetch(scheduler, 2, 10, 0.1)]
    scheduler.upgrade(guesses[1])
    finish(source, scheduler, first, *guesses)
    assert [k.expert for k, _, _ in source.log] == [0, 2, 1]


def test_quiesce_forgets_all_and_waits_for_the_reads_under_way(make):
    source, scheduler = make()
    reading = demand(scheduler, 0)
    source.started.acquire()
    queued = [demand(scheduler, 1), prefetch(scheduler, 2, 10, 0.5)]
    waiter = threading.Thread(target=scheduler.quiesce)
    waiter.start()
    time.sleep(0.05)
    assert waiter.is_alive(), "a read still writes to its slot"
    source.permit()
    waiter.join(timeout=5)
    assert not waiter.is_alive()
    assert {t.state for t in (reading, *queued)} == {State.CANCELLED}
    assert [k.expert for k, _, _ in source.log] == [0]
    again = demand(scheduler, 3)
    finish(source, scheduler, again)
    assert again.state is State.DONE


def test_cancelled_before_it_starts_reads_nothing(make):
    source, scheduler = make()
    blocker = demand(scheduler, 0, 10)
    source.started.acquire()
    guess = prefetch(scheduler, 1, 10, 0.9)
    assert scheduler.cancel(guess)
    assert guess.state is State.CANCELLED
    finish(source, scheduler, blocker)
    assert [k.expert for k, _, _ in source.log] == [0]


def test_cancelled_while_reading_stops_at_the_next_chunk(make):
    source, scheduler = make()
    guess = prefetch(scheduler, 1, 5 * PREFETCH_CHUNK_BYTES, 0.9)
    source.started.acquire()
    assert not scheduler.cancel(guess), "its slot is still being written"
    again = demand(scheduler, 1, 10)
    finish(source, scheduler, guess, again)
    assert guess.state is State.CANCELLED
    assert guess.bytes_read == PREFETCH_CHUNK_BYTES
    with pytest.raises(ClosedError):
        require_done(guess)
    assert again.state is State.DONE


def test_byte_cap():
    source = GatedSource()
    scheduler = TransferScheduler(source, workers=1, prefetch_cap_bytes=25)
    try:
        assert prefetch(scheduler, 1, 20, 0.9) is not None
        assert prefetch(scheduler, 2, 20, 0.9) is None
    finally:
        source.permit()
        scheduler.close()


def test_a_failure_reaches_the_waiter_typed(make):
    source, scheduler = make(error=OSError(5, "Input/output error"))
    transfer = demand(scheduler, 3, 10)
    finish(source, scheduler, transfer)
    with pytest.raises(TransferError, match=r"layer 0 expert 3 failed: .*Input/output error"):
        require_done(transfer)


def test_a_typed_failure_stays_what_it_is(make):
    source, scheduler = make(verify_error=ChecksumError("damaged"))
    transfer = demand(scheduler, 3, 10)
    finish(source, scheduler, transfer)
    with pytest.raises(ChecksumError, match="damaged"):
        require_done(transfer)
    again = demand(scheduler, 4)
    finish(source, scheduler, again)
    assert again.finished, "the thread lives on"


def test_closed_from_one_of_its_own_threads(make):
    """A model that is forgotten may be collected, and so closed, in a transfer thread that holds the lock."""
    before = transfer_threads()
    source, scheduler = make(workers=2, meter=lambda *_: scheduler.close())  # the meter is told under the lock
    threads = transfer_threads() - before
    assert len(threads) == 2
    demand(scheduler, 3, 10)
    source.permit()
    for thread in threads:
        thread.join(timeout=5)
        assert not thread.is_alive()
    deadline = time.monotonic() + 5
    while not source.closed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source.closed


def test_close_stops_every_thread_and_is_repeatable(make):
    before = transfer_threads()
    source, scheduler = make(workers=3)
    threads = transfer_threads() - before
    assert len(threads) == 3
    demand(scheduler, 0, 10)
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
        demand(scheduler, 1, 10)
