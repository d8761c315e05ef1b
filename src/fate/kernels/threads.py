"""How many threads compute: torch's number, which users set. While one of our forwards runs on compiled kernels,
torch's own operations, all of them small but a prompt's attention, stay on one: OpenMP's threads would look out for the
next one for milliseconds, on the cores that the kernels' helpers and the transfer threads need.

OpenMP keeps its number for each Python thread, and so does this module.

>>> with torch_alone():
...     torch.get_num_threads(), count()
(1, 2)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_here = threading.local()  # count: this thread's number, while it is in a forward
_forwards = 0  # threads in one
_first_count = 0  # the number of the first of them


def count() -> int:
    """Threads a kernel may use."""
    if own := getattr(_here, "count", 0):
        return int(own)
    now = torch.get_num_threads()
    return max(now, _first_count) if _forwards > 0 else now  # a thread that torch meets meanwhile was told 1


@contextmanager
def torch_alone() -> Iterator[None]:
    """A forward; within another one of the same thread it changes nothing."""
    if getattr(_here, "count", 0):
        yield
        return
    try:
        _begin(count())
        yield
    finally:
        _end()


def _begin(own: int) -> None:
    global _forwards, _first_count
    _here.count = own  # before it is lowered, and forgotten after it is restored: an interrupt may come between
    with _lock:
        if _forwards <= 0:
            _forwards, _first_count = 0, own
        _forwards += 1
    torch.set_num_threads(1)


def _end() -> None:
    global _forwards
    own = getattr(_here, "count", 0)
    if own:
        torch.set_num_threads(own)
        _here.count = 0
        with _lock:
            _forwards -= 1


@contextmanager
def torch_too() -> Iterator[None]:
    """Inside a forward: an operation of torch that is worth all threads."""
    own = getattr(_here, "count", 0)
    if not own:
        yield
        return
    torch.set_num_threads(own)
    try:
        yield
    finally:
        torch.set_num_threads(1)
