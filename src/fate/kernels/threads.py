"""How many threads compute: torch's number, which users set, for prompts and kernels alike. While a token is decoded,
torch's own operations, all of them small, stay on one: OpenMP's threads would look out for the next one for
milliseconds, on the cores that the kernels' helpers and the transfer threads need.

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
_steps = 0  # under way, of all models in this process
_count = 0  # torch's number, while there are any


def count() -> int:
    """Threads a kernel may use."""
    return _count if _steps else torch.get_num_threads()


def begin() -> None:
    """A decoding step begins; every one must `end`."""
    global _steps, _count
    with _lock:
        if not _steps:
            _count = torch.get_num_threads()
            torch.set_num_threads(1)
        _steps += 1


def end() -> None:
    """The step is over, however it ended."""
    global _steps
    with _lock:
        _steps -= 1
        if not _steps:
            torch.set_num_threads(_count)


@contextmanager
def torch_too() -> Iterator[None]:
    """Inside a step: an operation of torch that is worth all threads."""
    if not _steps:
        yield
        return
    torch.set_num_threads(_count)
    try:
        yield
    finally:
        torch.set_num_threads(1)
