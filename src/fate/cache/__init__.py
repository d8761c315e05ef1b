"""Which experts are resident: eviction policies, allocation over layers, and the slot table they act on."""

from fate.cache import activation_aware, arc, lrfu, lru  # noqa: F401 - they register themselves
from fate.cache.allocation import ALLOCATIONS, NEEDS_COSTS, SlotRequest
from fate.cache.base import POLICIES, EvictionPolicy
from fate.cache.expert_cache import Entry, ExpertCache

__all__ = ["ALLOCATIONS", "NEEDS_COSTS", "POLICIES", "Entry", "EvictionPolicy", "ExpertCache", "SlotRequest"]
