"""What `bench.systems` is asked to compare, checked before anything heavy is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fate.errors import UsageError
from fate.systems import ORACLES, System, resolve_system
from fate.units import parse_experts, parse_link

if TYPE_CHECKING:
    from fate.bench.prompts import Request

DISK = "disk"
SYSTEMS = "load-on-demand-uncached,load-on-demand,eap,cross-layer,fate-published,fate-oracle,fate,fate-hybrid"
EXPERTS = "10%,25%,50%,75%,90%"
SETTLE_TOKENS = 96  # the most steps that `runtime.switch` takes to decide
_SHORT_PROMPT = 2  # tokens


@dataclass(frozen=True)
class Comparison:
    """links: "disk" or speeds ("12GB/s"); rhos: further links, whose speeds follow from the measured compute.
    settle_tokens: at least so many are decoded before measuring, the recorded requests' included. timelines: also note
    when everything happens in one decoded token of each system, on each link with the middle budget."""

    systems: tuple[str, ...]
    experts: tuple[str, ...]
    links: tuple[str, ...] = (DISK,)
    rhos: tuple[float, ...] = ()
    repeats: int = 3
    settle_tokens: int = SETTLE_TOKENS
    timelines: bool = False

    def __post_init__(self) -> None:
        """Raises a UsageError for a name, share or speed that is none, and for nothing to compare."""
        for name in self.systems:
            system_called(name)
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
    def cells(self) -> list[tuple[str, str]]:
        """(name of a link, share of experts), in the order of measurement."""
        names = [*self.links, *(rho_name(rho) for rho in self.rhos)]
        return [(name, experts) for name in names for experts in self.experts]

    @property
    def lossy(self) -> list[str]:
        return [name for name in self.systems if not system_called(name).exact]

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

    def warm_up(self, settle_tokens: int) -> list[Request]:
        """The recorded requests, and, where these decode less than `settle_tokens`, tokens of theirs once more after
        hardly a prompt, from the last request backwards."""
        found = list(self.recorded)
        left = settle_tokens - sum(request.new_tokens for request in found)
        while self.recorded and left > 0:
            again = self.recorded[-1 - (len(found) - len(self.recorded)) % len(self.recorded)]
            new_tokens = min(left, self.context - _SHORT_PROMPT)
            found.append(replace(again, ids=again.ids[:, -new_tokens - _SHORT_PROMPT :], prompt_tokens=_SHORT_PROMPT))
            left -= new_tokens
        return found


@dataclass(frozen=True)
class Link:
    """bytes_per_s: its pace; None for the disk, whose speed is what it measures."""

    name: str
    bytes_per_s: float | None


def rho_name(rho: float) -> str:
    return f"ρ {rho:g}"


def system_called(name: str) -> System:
    """Any system that can be compared; raises UnknownNameError."""
    return ORACLES[name] if name in ORACLES else resolve_system(name)
