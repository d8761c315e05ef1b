"""Least recently used: evict the expert whose last access is longest ago."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container

from fate.cache.base import POLICIES, EvictionPolicy


@POLICIES.register("lru")
class LRU(EvictionPolicy):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._by_age: OrderedDict[int, None] = OrderedDict()  # oldest access first

    def on_hit(self, expert: int) -> None:
        self._by_age.move_to_end(expert)

    def on_insert(self, expert: int) -> None:
        self._by_age[expert] = None

    def on_evict(self, expert: int) -> None:
        del self._by_age[expert]

    def victim(self, pinned: Container[int]) -> int | None:
        return next((expert for expert in self._by_age if expert not in pinned), None)
