"""Adaptive Replacement Cache: balances recency against frequency by what it regrets having evicted.

Source: Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003, figure 4.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container

from fate.cache.base import POLICIES, EvictionPolicy

Order = OrderedDict[int, None]  # least recent first


@POLICIES.register("arc")
class ARC(EvictionPolicy):
    """The paper's lists: T1 holds cached experts accessed once of late, T2 those accessed again; B1 and B2 remember
    (without their bytes) experts that left T1 and T2. p is the size that T1 aims at.

    Exactly the paper's algorithm where nothing is pinned. A pinned expert is passed over for the next of its list, then
    of the other list. The paper's bounds always hold: T1 + B1 <= capacity, all four lists <= 2 * capacity.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.t1, self.t2, self.b1, self.b2 = Order(), Order(), Order(), Order()
        self.p = 0.0
        self._incoming: int | None = None  # missed, and p has not yet learned from it
        self._learned: int | None = None  # p has, and it is not in yet

    def on_hit(self, expert: int) -> None:
        self.t1.pop(expert, None)
        self.t2[expert] = None
        self.t2.move_to_end(expert)

    def on_miss(self, expert: int) -> None:
        self._incoming = expert

    def on_evict(self, expert: int) -> None:
        # The paper adapts p before it replaces, when the ghosts do not yet include the victim.
        if self._incoming is not None:
            self._learn(self._incoming)
        cached, ghosts = (self.t1, self.b1) if expert in self.t1 else (self.t2, self.b2)
        del cached[expert]
        ghosts[expert] = None

    def on_insert(self, expert: int) -> None:
        if self._learned != expert:
            self._learn(expert)
        self._incoming = self._learned = None
        returns = expert in self.b1 or expert in self.b2
        self.b1.pop(expert, None)
        self.b2.pop(expert, None)
        (self.t2 if returns else self.t1)[expert] = None
        self._trim()

    def resize(self, capacity: int) -> None:
        super().resize(capacity)
        self.p = min(self.p, float(capacity))
        self._trim()

    def victim(self, pinned: Container[int]) -> int | None:
        size, p = len(self.t1), self._target(self._incoming)
        from_t1 = size > p or (size == p and self._incoming in self.b2)
        first, second = (self.t1, self.t2) if from_t1 else (self.t2, self.t1)
        return next((expert for order in (first, second) for expert in order if expert not in pinned), None)

    def _learn(self, expert: int) -> None:
        self.p = self._target(expert)
        self._incoming, self._learned = None, expert

    def _target(self, incoming: int | None) -> float:
        """p after an access to `incoming`: towards T1 if it was evicted from there too early, towards T2 likewise."""
        b1, b2 = len(self.b1), len(self.b2)
        if incoming in self.b1:
            return min(float(self.capacity), self.p + max(b2 / b1, 1.0))
        if incoming in self.b2:
            return max(0.0, self.p - max(b1 / b2, 1.0))
        return self.p

    def _trim(self) -> None:
        """Forget the oldest ghosts beyond the bounds.

        The paper does so before it replaces; the ghost that it then adds is the newest, so the same ones go.
        """
        while self.b1 and len(self.t1) + len(self.b1) > self.capacity:
            self.b1.popitem(last=False)
        while self.b2 and len(self.t1) + len(self.t2) + len(self.b1) + len(self.b2) > 2 * self.capacity:
            self.b2.popitem(last=False)
