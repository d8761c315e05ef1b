"""What `bench.systems` is asked to compare, checked before anything heavy is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fate.errors import UsageError
from fate.memory import parse_experts
from fate.systems import resolve_system
from fate.transfer.link import parse_link

if TYPE_CHECKING:
    from fate.bench.prompts import Request

DISK = "disk"
SYSTEMS = "load-on-demand-uncached,load-on-demand,eap,cross-layer,fate-published,fate,fate-hybrid"
EXPERTS = "10%,25%,50%,75%,90%"


@dataclass(frozen=True)
class Comparison:
    """links: "disk" or speeds ("12GB/s"); rhos: further links, whose speeds follow from the measured compute.
    settle_tokens: at least so many are decoded after the recorded requests, before measuring. timelines: also note when
    everything happens in one decoded token of each system, on each link with the middle budget."""

    systems: tuple[str, ...]
    experts: tuple[str, ...]
    links: tuple[str, ...] = (DISK,)
    rhos: tuple[float, ...] = ()
    repeats: int = 3
    settle_tokens: int = 64
    timelines: bool = False

    def __post_init__(self) -> None:
        """Raises a UsageError for a name, share or speed that is none, and for nothing to compare."""
        for name in self.systems:
            resolve_system(name)
        for share in self.experts:
            parse_experts(share, total=1)
        for link in self.links:
            if link != DISK:
                parse_link(link)
        for rho in self.rhos:
            if not 0 < rho < math.inf:
                raise UsageError(f"rho {rho} is not valid: give a positive number, such as 0.5")
        for option, values in (("systems", self.systems), ("experts", self.experts), ("link", self.links + self.rhos)):
            if not values:
                raise UsageError(f"nothing to compare: give at least one name to --{option}")
            if len(set(values)) < len(values):
                raise UsageError(f"--{option} {','.join(map(str, values))} names one twice: name each once")

    @property
    def num_cells(self) -> int:
        return (len(self.links) + len(self.rhos)) * len(self.experts)

    @property
    def lossy(self) -> list[str]:
        return [name for name in self.systems if not resolve_system(name).exact]

    @property
    def middle_experts(self) -> str:
        return self.experts[len(self.experts) // 2]


@dataclass(frozen=True)
class Workload:
    """measured: the requests of every measurement. recorded: other requests, run before it."""

    measured: Sequence[Request]
    recorded: Sequence[Request]

    @property
    def context(self) -> int:
        return int(self.measured[0].ids.shape[1])

    def settling(self, tokens: int) -> list[int]:
        """Which recorded requests, the last first and over and over, decode at least so many tokens."""
        if not self.recorded:
            return []
        count = math.ceil(tokens / self.recorded[0].new_tokens)
        return [-1 - at % len(self.recorded) for at in range(count)]


@dataclass(frozen=True)
class Link:
    """bytes_per_s: its pace; None for the disk, whose speed is what it measures."""

    name: str
    bytes_per_s: float | None
