"""The seam for eviction: which of one layer's cached experts goes when another must come.

One policy object serves one layer. It is told of every access, insertion and eviction and answers `victim`; it holds
no bytes and knows no slots (see `expert_cache.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container

from fate.registry import Registry


class EvictionPolicy(ABC):
    """Order of the cached experts of one layer. `capacity` is the most experts it will be told to hold."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    @abstractmethod
    def on_hit(self, expert: int) -> None:
        """`expert` is cached and was accessed."""

    def on_miss(self, expert: int) -> None:  # noqa: B027 - most policies look only at what is cached
        """`expert` is not cached, was accessed and may enter next, after `victim` and `on_evict` where none is free."""

    @abstractmethod
    def on_insert(self, expert: int) -> None:
        """`expert` was not cached and now is, because it was accessed."""

    @abstractmethod
    def on_evict(self, expert: int) -> None:
        """`expert` left the cache (as the last `victim`, or because its bytes could not be read)."""

    def resize(self, capacity: int) -> None:
        """The most experts it will be told to hold is another now; it holds no more than that."""
        self.capacity = capacity

    def begin_request(self) -> None:  # noqa: B027 - most policies keep nothing of a request
        """A new sequence starts with the next access."""

    @abstractmethod
    def victim(self, pinned: Container[int]) -> int | None:
        """The cached expert to evict next, never one in `pinned`; None when all are. Changes nothing."""


POLICIES: Registry[type[EvictionPolicy]] = Registry("eviction policy")
