"""Named systems: each a frozen choice on every axis. Adding one is one entry.

`exact` is not a system but the promise: it resolves to the fastest system here whose output is bit-identical to the
fully resident model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fate.cache import ALLOCATIONS, NEEDS_COSTS, POLICIES
from fate.errors import NeedsFutureError, UnknownNameError
from fate.precision import PRECISIONS
from fate.predict import PREDICTORS
from fate.registry import Registry


@dataclass(frozen=True)
class System:
    """predictor, policy, allocation, precision: names in their registries. cached: whether experts stay once used.
    switches_off: prefetching is tried, and given up where it loses. source: where it was published."""

    name: str
    predictor: str = "none"
    policy: str = "lru"
    allocation: str = "uniform"
    precision: str = "full"
    cached: bool = True
    switches_off: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        PREDICTORS.get(self.predictor)
        POLICIES.get(self.policy)
        ALLOCATIONS.get(self.allocation)
        PRECISIONS.get(self.precision)

    @property
    def needs_profile(self) -> bool:
        """Whether it goes by measured times of this machine and store."""
        return self.allocation in NEEDS_COSTS or PRECISIONS.get(self.precision).needs_timing

    @property
    def prefetches(self) -> bool:
        return self.predictor != "none"

    @property
    def exact(self) -> bool:
        return PRECISIONS.get(self.precision).exact


SYSTEMS: Registry[System] = Registry("system")
EXACT = "exact"

for _system in (
    System(
        "load-on-demand-uncached",
        cached=False,
        source="the baseline of arXiv 2502.12224 without a cache: every expert is fetched when routed to",
    ),
    System("load-on-demand", source="the baseline of arXiv 2502.12224: experts fetched when routed to, LRU"),
    System(
        "cross-layer",
        predictor="cross-layer",
        source="Fate's cross-layer gate, arXiv 2502.12224, over LRU",
    ),
    System(
        "eap",
        predictor="activation-path",
        policy="activation-aware",
        source="MoE-Infinity, arXiv 2401.14361: the expert activation path of Fate's comparison",
    ),
    System(
        "fate-published",
        predictor="cross-layer",
        policy="arc",
        allocation="shallow",
        source="Fate, arXiv 2502.12224, with its shallow-favoring cache; uniform precision",
    ),
    System(
        "fate",
        predictor="cross-layer",
        policy="lrfu",
        switches_off=True,
        source="ours: the published system with what measurement added and without what it took away",
    ),
    System(
        "fate-measured",
        predictor="cross-layer",
        policy="lrfu",
        allocation="measured",
        switches_off=True,
        source="fate, its slots shared by what a miss costs in each layer",
    ),
    System(
        "fate-hybrid",
        predictor="cross-layer",
        policy="lrfu",
        precision="popularity",
        switches_off=True,
        source="fate with the hybrid quantization of arXiv 2502.12224: lossy in prefill",
    ),
    System(
        "cross-layer-int2",
        predictor="cross-layer",
        precision="int2",
        source="lossy: every expert at INT2",
    ),
):
    SYSTEMS.register(_system.name)(_system)

# `fate` with a perfect predictor. They are told the routing to come, so only a comparison, which has recorded it, can
# run them: as values, since their names are not for `fate.load`.
ORACLES = {
    name: replace(
        SYSTEMS.get("fate"),
        name=name,
        predictor=predictor,
        switches_off=False,
        source="fate, its predictor never wrong: what better prediction could gain",
    )
    for name, predictor in (("fate-oracle", "oracle"), ("fate-oracle-far", "oracle-far"))
}


def resolve_system(system: str | System) -> System:
    """The system called `system`; raises UnknownNameError, and NeedsFutureError for one of ORACLES by name."""
    if isinstance(system, System):
        return system
    if system in ORACLES:
        raise NeedsFutureError(system)
    if system not in system_names():
        raise UnknownNameError("system", system, system_names())
    return SYSTEMS.get("fate" if system == EXACT else system)


def system_names() -> tuple[str, ...]:
    """Everything `--system` accepts."""
    return (EXACT, *SYSTEMS.names())
