"""Which experts are resident: eviction policies, allocation over layers, and the slot table they act on."""

from fate.cache import lru as lru  # registers itself
from fate.cache.allocation import ALLOCATIONS
from fate.cache.base import POLICIES, EvictionPolicy
from fate.cache.expert_cache import Entry, ExpertCache

__all__ = ["ALLOCATIONS", "POLICIES", "Entry", "EvictionPolicy", "ExpertCache"]
