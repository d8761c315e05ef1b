"""Named systems: each a frozen choice on every axis. Adding one is one entry.

`exact` is not a system but the promise: it resolves to the fastest system here whose output is bit-identical to the
fully resident model.
"""

from __future__ import annotations

from dataclasses import dataclass

from fate.cache import ALLOCATIONS, POLICIES
from fate.errors import UnknownNameError
from fate.precision import PRECISIONS
from fate.predict import PREDICTORS
from fate.registry import Registry


@dataclass(frozen=True)
class System:
    """predictor, policy, allocation, precision: names in their registries. source: where it was published."""

    name: str
    predictor: str = "none"
    policy: str = "lru"
    allocation: str = "uniform"
    precision: str = "full"
    source: str = ""

    def __post_init__(self) -> None:
        PREDICTORS.get(self.predictor)
        POLICIES.get(self.policy)
        ALLOCATIONS.get(self.allocation)
        PRECISIONS.get(self.precision)

    @property
    def exact(self) -> bool:
        return PRECISIONS.get(self.precision).exact


SYSTEMS: Registry[System] = Registry("system")
EXACT = "exact"

for _system in (
    System("load-on-demand", source="the baseline of arXiv 2502.12224: experts fetched when routed to, LRU"),
    System("cross-layer", predictor="cross-layer", source="Fate's cross-layer gate, arXiv 2502.12224, over LRU"),
    System("cross-layer-int2", predictor="cross-layer", precision="int2", source="lossy: every expert at INT2"),
):
    SYSTEMS.register(_system.name)(_system)


def resolve_system(system: str | System) -> System:
    """The system called `system`; raises UnknownNameError."""
    if isinstance(system, System):
        return system
    if system not in system_names():
        raise UnknownNameError("system", system, system_names())
    return SYSTEMS.get("cross-layer" if system == EXACT else system)


def system_names() -> tuple[str, ...]:
    """Everything `--system` accepts."""
    return (EXACT, *SYSTEMS.names())
