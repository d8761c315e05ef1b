"""What every test shares: one thread, no network, and the optional data beside the checkout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports torch, and inherited by the processes that tests start. One thread: tiny models gain nothing
# from more, and on a busy machine every barrier between threads may cost a time slice.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

_SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of recorded traces, prompts and corpora; skips where the checkout has none beside it."""
    if not _SHARED_DATA.is_dir():
        pytest.skip(f"no data folder at {_SHARED_DATA}")
    return _SHARED_DATA


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A test may set the number of threads; this puts it back."""
    import torch

    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
