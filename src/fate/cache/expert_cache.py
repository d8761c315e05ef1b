"""The slot table: which expert is in which slot, and who may take whose place.

All slots are equal. Each layer *caches* up to its capacity, in the order of its eviction policy; layers may also share
one pool (`shared`). Besides, up to `transient` experts of any layer are *staged*: prefetched and not yet asked for, or
passing through because a layer needs more experts than it may cache. A staged expert that its layer asks for is
promoted into the cache without moving a byte, and the victim's slot becomes free. So a wrong prefetch costs the cache
nothing.

A slot is free when its last user says so: a read that still writes to it, or a kernel that still reads it. On a CPU a
kernel has finished when it returns.

Owns no bytes, no threads, no clock; every call is made under the owner's lock.

>>> from fate.cache.lru import LRU
>>> cache = ExpertCache([8], [2], transient=1, policy=LRU)
>>> cache.admit(ExpertKey(0, 5)).slot, cache.admit(ExpertKey(0, 6)).slot
(0, 1)
>>> cache.admit(ExpertKey(0, 7)).slot       # evicts 5
0
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from fate.cache.base import EvictionPolicy
from fate.core import ExpertKey, Precision


class User(Protocol):
    """Somebody who reads or writes a slot: a transfer, or an event on a device."""

    @property
    def finished(self) -> bool: ...


T = TypeVar("T", bound=User)


class State(enum.Enum):
    """LOADING: a read into the slot is under way. READY: the slot holds `precision`."""

    LOADING = enum.auto()
    READY = enum.auto()


class Origin(enum.Enum):
    """Why an expert is there: a layer has asked for it, or so far only a prediction named it."""

    DEMAND = enum.auto()
    PREFETCH = enum.auto()


@dataclass(eq=False, slots=True)
class Entry(Generic[T]):
    """One resident (or arriving) expert.

    precision: what the slot holds now (None: nothing yet). transfer: the read under way, of an entry that is LOADING.
    staged: in the transient region. confidence: of a prefetch. last_use: who computes with the slot on a device.
    """

    key: ExpertKey
    slot: int
    staged: bool
    origin: Origin = Origin.DEMAND
    precision: Precision | None = None
    transfer: T | None = None
    confidence: float = 0.0
    last_use: User | None = None

    @property
    def state(self) -> State:
        return State.READY if self.transfer is None else State.LOADING

    @property
    def in_use(self) -> bool:
        """Whether somebody still reads or writes the slot."""
        return (self.transfer is not None and not self.transfer.finished) or (
            self.last_use is not None and not self.last_use.finished
        )


@dataclass(eq=False)
class _Pool(Generic[T]):
    """Cached experts that compete for `capacity` slots. The policy knows an expert by `first[layer] + expert`."""

    policy: EvictionPolicy
    capacity: int
    entries: dict[int, Entry[T]] = field(default_factory=dict)


class ExpertCache(Generic[T]):
    """num_experts, capacities: of each layer. shared: layers share one pool of sum(capacities) slots.

    There are sum(capacities) + transient slots, numbered from 0.
    """

    def __init__(
        self,
        num_experts: Sequence[int],
        capacities: Sequence[int],
        transient: int,
        policy: Callable[[int], EvictionPolicy],
        *,
        shared: bool = False,
    ) -> None:
        if transient < 1:
            raise ValueError(f"the transient region needs at least one slot, not {transient}")
        self.num_experts = tuple(num_experts)
        self.capacities = tuple(capacities)
        self.transient = transient
        self.num_slots = sum(capacities) + transient
        self.evictions = 0
        self.pinned: set[ExpertKey] = set()  # experts a lease computes with: never evicted
        self._policy = policy
        self._shared = shared
        self._first = [sum(num_experts[:layer]) if shared else 0 for layer in range(len(num_experts))]
        self.clear()

    def clear(self) -> None:
        """Forget everything: all slots free, all policies new."""
        self.pinned.clear()
        sizes = [sum(self.capacities)] if self._shared else self.capacities
        pools: list[_Pool[T]] = [_Pool(self._policy(size), size) for size in sizes]
        self._pools = pools * len(self.capacities) if self._shared else pools  # by layer
        self._resident: list[dict[int, Entry[T]]] = [{} for _ in self.capacities]  # by layer and expert, staged too
        self._cached: list[dict[int, Entry[T]]] = [{} for _ in self.capacities]  # by layer and expert
        self._staged: dict[ExpertKey, Entry[T]] = {}
        self._free = list(range(self.num_slots - 1, -1, -1))  # popped from the end: slot 0 first
        self._releasing: list[Entry[T]] = []  # dropped, while somebody still uses their slots

    def lookup(self, layer: int, expert: int) -> Entry[T] | None:
        return self._resident[layer].get(expert)

    def resident(self, layer: int) -> Mapping[int, Entry[T]]:
        """The experts of `layer` that are cached or staged, landed or not."""
        return self._resident[layer]

    @property
    def num_staged(self) -> int:
        return len(self._staged)

    def touch_all(self, layer: int, experts: Iterable[int]) -> None:
        """Cached experts of one layer were accessed, in this order."""
        policy, first = self._pools[layer].policy, self._first[layer]
        for expert in experts:
            policy.on_hit(first + expert)

    def touch(self, entry: Entry[T]) -> None:
        """A cached expert was accessed."""
        layer, expert = entry.key
        self._pools[layer].policy.on_hit(self._first[layer] + expert)

    def admit(self, key: ExpertKey) -> Entry[T] | None:
        """Cache a new expert of `key.layer`, evicting if its pool is full; None when every cached one is in use."""
        self._pools[key.layer].policy.on_miss(self._first[key.layer] + key.expert)
        slot = self._slot_for(key.layer)
        return None if slot is None else self._enter(Entry(key, slot, staged=False))

    @property
    def can_stage(self) -> bool:
        """Whether `stage` has a slot to give."""
        if self._releasing:
            self.reap()
        return len(self._staged) < self.transient and bool(self._free)

    def stage(self, key: ExpertKey) -> Entry[T] | None:
        """Give a new expert a transient slot; None when the region is full."""
        if not self.can_stage:
            return None
        return self._enter(Entry(key, self._free.pop(), staged=True))

    def promote(self, entry: Entry[T]) -> bool:
        """Turn a staged expert into a cached one; False when its pool is all in use."""
        layer, expert = entry.key
        self._pools[layer].policy.on_miss(self._first[layer] + expert)
        slot = self._slot_for(layer)
        if slot is None:
            return False
        self._free.append(slot)  # the expert keeps its own slot, the pool's goes back
        del self._staged[entry.key]
        entry.staged = False
        self._cache(entry)
        return True

    def drop(self, entry: Entry[T]) -> None:
        """Forget a resident expert. Its slot is free once nobody uses it."""
        self._remove(entry)
        if entry.in_use:
            self._releasing.append(entry)
        else:
            self._free.append(entry.slot)

    def reap(self) -> None:
        """Take back the slots whose last users have finished."""
        self._free += [entry.slot for entry in self._releasing if not entry.in_use]
        self._releasing = [entry for entry in self._releasing if entry.in_use]

    def releasing(self) -> list[T]:
        """Reads that keep slots from being free."""
        return [entry.transfer for entry in self._releasing if entry.transfer is not None]

    def staged(self) -> list[Entry[T]]:
        """Entries of the transient region, oldest first."""
        return list(self._staged.values())

    def begin_request(self) -> None:
        """A new sequence starts."""
        for pool in self._pools[:1] if self._shared else self._pools:
            pool.policy.begin_request()

    @property
    def num_all_cached(self) -> int:
        """How many experts all layers cache."""
        return sum(map(len, self._cached))

    def num_cached(self, layer: int) -> int:
        """How many experts `layer` caches, landed or not; staged ones are not among them."""
        return len(self._cached[layer])

    def cached(self, layer: int) -> Container[int]:
        """Those experts."""
        return self._cached[layer]

    def _enter(self, entry: Entry[T]) -> Entry[T]:
        layer, expert = entry.key
        if expert in self._resident[layer]:
            raise ValueError(f"{entry.key} is resident already")
        self._resident[layer][expert] = entry
        if entry.staged:
            self._staged[entry.key] = entry
        else:
            self._cache(entry)
        return entry

    def _cache(self, entry: Entry[T]) -> None:
        layer, expert = entry.key
        pool, number = self._pools[layer], self._first[layer] + expert
        self._cached[layer][expert] = pool.entries[number] = entry
        pool.policy.on_insert(number)

    def _remove(self, entry: Entry[T]) -> None:
        layer, expert = entry.key
        del self._resident[layer][expert]
        if entry.staged:
            del self._staged[entry.key]
            return
        pool, number = self._pools[layer], self._first[layer] + expert
        del self._cached[layer][expert], pool.entries[number]
        pool.policy.on_evict(number)

    def _slot_for(self, layer: int) -> int | None:
        """A slot for one more cached expert of `layer`, from the free ones or a victim; None where all are in use."""
        if self._releasing:
            self.reap()
        pool = self._pools[layer]
        if len(pool.entries) < pool.capacity and self._free:
            return self._free.pop()
        victim = pool.policy.victim(_InUse(pool.entries, self.pinned))
        if victim is None:
            return None
        entry = pool.entries[victim]
        self._remove(entry)
        self.evictions += 1
        return entry.slot


class _InUse(Generic[T]):
    """`number in in_use`: a lease holds the expert, or somebody still uses its slot."""

    def __init__(self, entries: dict[int, Entry[T]], pinned: Container[ExpertKey]) -> None:
        self._entries = entries
        self._pinned = pinned

    def __contains__(self, number: object) -> bool:
        assert isinstance(number, int)
        entry = self._entries[number]
        return entry.in_use or entry.key in self._pinned
