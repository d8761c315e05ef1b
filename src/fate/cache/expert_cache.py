"""The slot table: which expert is in which slot, and who may take whose place.

Slots are equal and belong to nobody for good. Each layer *caches* up to its capacity, ordered by its eviction
policy. Besides, up to `transient` experts of any layer are *staged*: prefetched and not yet asked for, or passing
through because a layer needs more experts than it may cache. A staged expert that proves useful is promoted into its
layer's cache without moving a byte; the victim's slot joins the free ones. So a wrong guess costs the cache nothing.

Owns no bytes, no threads, no clock; every call is made under the owner's lock.

>>> from fate.cache.lru import LRU
>>> cache = ExpertCache([2], transient=1, policy=LRU)
>>> cache.admit(ExpertKey(0, 5)).slot, cache.admit(ExpertKey(0, 6)).slot
(0, 1)
>>> cache.admit(ExpertKey(0, 7)).slot       # evicts 5
0
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from fate.cache.base import EvictionPolicy
from fate.core import ExpertKey, Precision


class Finishable(Protocol):
    """What the cache must know of a transfer: whether it may still write to its slot."""

    @property
    def finished(self) -> bool: ...


T = TypeVar("T", bound=Finishable)


@dataclass(eq=False)
class Entry(Generic[T]):
    """One resident (or arriving) expert.

    staged: in the transient region. precision: what the slot holds (None: nothing yet). transfer: the read under way.
    prefetched: read before it was asked for; confidence: of that guess; guessed_bytes: what of it
    had been read when an early word of the router confirmed it. early: demanded ahead of the access.
    """

    key: ExpertKey
    slot: int
    staged: bool
    precision: Precision | None = None
    transfer: T | None = None
    prefetched: bool = False
    confidence: float = 0.0
    guessed_bytes: int | None = None
    early: bool = False


class ExpertCache(Generic[T]):
    """Slots 0 .. sum(capacities) + transient - 1 shared by the experts of all layers."""

    def __init__(self, capacities: Sequence[int], transient: int, policy: Callable[[int], EvictionPolicy]) -> None:
        if transient < 1:
            raise ValueError(f"the transient region needs at least one slot, not {transient}")
        self.capacities = tuple(capacities)
        self.transient = transient
        self.num_slots = sum(capacities) + transient
        self.evictions = 0
        self.pinned: set[ExpertKey] = set()  # experts a lease computes with: never evicted
        self._policy = policy
        self._whole_in = [array("q") for _ in capacities]  # see `whole_slots`
        self.clear()

    def clear(self) -> None:
        """Forget everything: all slots free, all policies new."""
        self.pinned.clear()
        self._policies = [self._policy(capacity) for capacity in self.capacities]
        self._cached: list[dict[int, Entry[T]]] = [{} for _ in self.capacities]  # of each layer, by expert
        self._staged: dict[ExpertKey, Entry[T]] = {}
        self._entries: dict[ExpertKey, Entry[T]] = {}
        for slots in self._whole_in:
            del slots[:]
        self._free = list(range(self.num_slots - 1, -1, -1))  # popped from the end: slot 0 first

    def lookup(self, key: ExpertKey) -> Entry[T] | None:
        return self._entries.get(key)

    def whole(self, layer: int, experts: Iterable[int]) -> list[Entry[T]] | None:
        """Their entries, if every one is cached, read whole and not being read; changes nothing."""
        cached, found = self._cached[layer], []
        for expert in experts:
            entry = cached.get(expert)
            if entry is None or entry.transfer is not None or entry.precision is not Precision.FULL:
                return None
            found.append(entry)
        return found

    def whole_slots(self, layer: int) -> array[int]:
        """By expert, the slot of those that are cached, read whole and not being read; -1, or beyond the end, of
        others. What is whole stays so for as long as it is cached."""
        return self._whole_in[layer]

    def settled(self, entry: Entry[T]) -> None:
        """What is read into the entry's slot has been: it is no longer being read."""
        if entry.staged or entry.precision is not Precision.FULL or entry.transfer is not None:
            return
        slots, expert = self._whole_in[entry.key.layer], entry.key.expert
        slots.extend([-1] * (expert + 1 - len(slots)))
        slots[expert] = entry.slot

    def touch(self, entry: Entry[T]) -> None:
        """A cached expert was accessed."""
        self._policies[entry.key.layer].on_hit(entry.key.expert)

    def admit(self, key: ExpertKey) -> Entry[T] | None:
        """Cache a new expert of `key.layer`, evicting if its layer is full; None when every cached one is pinned."""
        self._policies[key.layer].on_miss(key.expert)
        slot = self._make_room(key.layer)
        if slot is None:
            return None
        return self._enter(Entry(key, slot, staged=False))

    def stage(self, key: ExpertKey) -> Entry[T] | None:
        """Give a new expert a transient slot; None when the region is full."""
        if len(self._staged) >= self.transient or not self._free:
            return None
        return self._enter(Entry(key, self._free.pop(), staged=True))

    def promote(self, entry: Entry[T]) -> bool:
        """Turn a staged expert into a cached one; False when its layer's cache is all pinned."""
        self._policies[entry.key.layer].on_miss(entry.key.expert)
        slot = self._make_room(entry.key.layer)
        if slot is None:
            return False
        self._free.append(slot)  # the expert keeps its own slot, the layer's goes back
        del self._staged[entry.key]
        entry.staged = False
        self._count_cached(entry)
        self.settled(entry)
        return True

    def drop(self, entry: Entry[T], *, keep_slot: bool = False) -> None:
        """Forget a resident expert. `keep_slot`: a read still writes to its slot; `free_slot` comes later."""
        del self._entries[entry.key]
        if entry.staged:
            del self._staged[entry.key]
        else:
            del self._cached[entry.key.layer][entry.key.expert]
            self._policies[entry.key.layer].on_evict(entry.key.expert)
            if entry.key.expert < len(slots := self._whole_in[entry.key.layer]):
                slots[entry.key.expert] = -1
        if not keep_slot:
            self._free.append(entry.slot)

    def free_slot(self, slot: int) -> None:
        self._free.append(slot)

    def resize(self, capacities: Sequence[int], transient: int) -> bool:
        """Divide the same slots otherwise, evicting what a layer may no longer cache.

        False, and nothing changes, while leases or reads hold what would have to go, or more experts are staged than
        may be then.
        """
        if sum(capacities) + transient != self.num_slots:
            raise ValueError(f"{sum(capacities)} cached and {transient} transient experts are not {self.num_slots}")
        surplus = [max(len(cached) - capacity, 0) for cached, capacity in zip(self._cached, capacities, strict=True)]
        if len(self._staged) > transient or any(
            self._num_movable(layer) < count for layer, count in enumerate(surplus) if count
        ):
            return False
        self.capacities, self.transient = tuple(capacities), transient
        for layer, count in enumerate(surplus):
            self._free += [slot for _ in range(count) if (slot := self._evict(layer)) is not None]
            self._policies[layer].resize(capacities[layer])
        return True

    def staged(self) -> list[Entry[T]]:
        """Entries of the transient region, oldest first."""
        return list(self._staged.values())

    def begin_request(self) -> None:
        """A new sequence starts."""
        for policy in self._policies:
            policy.begin_request()

    @property
    def num_all_cached(self) -> int:
        """How many experts all layers cache."""
        return len(self._entries) - len(self._staged)

    def num_cached(self, layer: int) -> int:
        """How many experts `layer` caches, landed or not; staged ones are not among them."""
        return len(self._cached[layer])

    def cached(self, layer: int) -> Container[int]:
        """Those experts."""
        return self._cached[layer]

    def _enter(self, entry: Entry[T]) -> Entry[T]:
        if entry.key in self._entries:
            raise ValueError(f"{entry.key} is resident already")
        self._entries[entry.key] = entry
        if entry.staged:
            self._staged[entry.key] = entry
        else:
            self._count_cached(entry)
        return entry

    def _count_cached(self, entry: Entry[T]) -> None:
        self._cached[entry.key.layer][entry.key.expert] = entry
        self._policies[entry.key.layer].on_insert(entry.key.expert)

    def _make_room(self, layer: int) -> int | None:
        """A slot for one more cached expert of `layer`."""
        if len(self._cached[layer]) < self.capacities[layer] and self._free:
            return self._free.pop()
        return self._evict(layer)

    def _evict(self, layer: int) -> int | None:
        """The slot of the expert that `layer` does best without; None when it must keep all it caches."""
        victim = self._policies[layer].victim(_Unmovable(self._cached[layer], self.pinned))
        if victim is None:
            return None
        entry = self._cached[layer][victim]
        self.drop(entry, keep_slot=True)
        self.evictions += 1
        return entry.slot

    def _num_movable(self, layer: int) -> int:
        cached = self._cached[layer]
        unmovable = _Unmovable(cached, self.pinned)
        return sum(expert not in unmovable for expert in cached)


class _Unmovable(Generic[T]):
    """`expert in unmovable`: a lease holds it, or a read still writes to its slot."""

    def __init__(self, cached: Mapping[int, Entry[T]], pinned: Container[ExpertKey]) -> None:
        self._cached = cached
        self._pinned = pinned

    def __contains__(self, expert: object) -> bool:
        assert isinstance(expert, int)
        entry = self._cached[expert]
        return (entry.transfer is not None and not entry.transfer.finished) or entry.key in self._pinned
