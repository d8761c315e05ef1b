"""What one machine needs for the layers of one store: a value, the arithmetic on it, and the file it is kept in.

A profile is believed only on the machine, for the store and by the version of Fate that it was measured with;
`read_profile` says why it is not. Measuring is `tools/profiling.py`'s.

>>> reading = read_profile(store, header)
>>> reading.profile.timing().compute_s(layer=3, tokens=40) if reading.profile else reading.why_not
'it is of another machine (Xeon, 2 threads, avx512 kernels, file system 9c1f)'
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fate import kernels
from fate.core import Precision
from fate.directories import cache_directory
from fate.fileio import replace_file
from fate.store.format import StoreHeader
from fate.store.reader import EXPERTS_FILE

VERSION = 1
PROFILE_FILE = "profile.json"
OCCUPANCY = 0.1  # what a read costs though it is hidden, in units of itself: the link is not there for other prefetches


@dataclass(frozen=True)
class Machine:
    """What a profile depends on. threads: torch's. disk: identifies the file system that holds the store."""

    processor: str
    threads: int
    kernels: str
    disk: str

    @classmethod
    def current(cls, store: Path) -> Machine:
        """This machine, for a store; raises OSError where there is none."""
        file = store / EXPERTS_FILE
        disk = os.statvfs(file).f_fsid or file.stat().st_dev
        return cls(_processor(), torch.get_num_threads(), kernels.active().name, f"{disk:x}")

    def __str__(self) -> str:
        return f"{self.processor}, {self.threads} threads, {self.kernels} kernels, file system {self.disk}"


@dataclass(frozen=True)
class LayerProfile:
    """One MoE layer.

    compute_s: of a whole decoder layer with all experts at hand, for each of `Profile.tokens`. full_s, int2_s: the read
    of one expert from the idle disk; full_bytes, int2_bytes: what is read; int2 is None where the store has none.
    recall: share of the experts it used while decoding that the cross-layer gate had named, None where it was not
    asked. misses: of LRU per decoding step, when the layer caches 0, 1, .. all of its experts.
    """

    compute_s: tuple[float, ...]
    full_s: float
    full_bytes: int
    int2_s: float | None
    int2_bytes: int | None
    recall: float | None
    misses: tuple[float, ...]

    def __post_init__(self) -> None:
        if (self.int2_s is None) != (self.int2_bytes is None):
            raise ValueError("int2_s and int2_bytes go together")
        numbers = (*self.compute_s, self.full_s, self.full_bytes, self.int2_s, self.int2_bytes)
        if not all(_is_number(x) and x > 0 for x in numbers if x is not None):
            raise ValueError("times and sizes must be positive")
        if self.recall is not None and not (_is_number(self.recall) and 0 <= self.recall <= 1):
            raise ValueError("recall must be a share")
        pairs = zip(self.misses, self.misses[1:])
        if not all(_is_number(x) and x >= 0 for x in self.misses) or any(a < b for a, b in pairs):
            raise ValueError("misses must not grow with the number of cached experts")


@dataclass(frozen=True)
class Profile:
    """fingerprint: the store's. tokens: of a forward, ascending, for which `compute_s` was measured. link_bytes_per_s:
    of experts read one after the other as transfers are."""

    fingerprint: str
    machine: Machine
    tokens: tuple[int, ...]
    link_bytes_per_s: float
    layers: tuple[LayerProfile, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip((0, *self.tokens), self.tokens))
        if not self.tokens or not all(type(n) is int for n in self.tokens) or not ascending:
            raise ValueError("tokens must ascend from 1")
        if not self.layers or any(len(layer.compute_s) != len(self.tokens) for layer in self.layers):
            raise ValueError("compute_s must have a time for each number of tokens")
        if not _is_number(self.link_bytes_per_s) or self.link_bytes_per_s <= 0:
            raise ValueError("link_bytes_per_s must be positive")

    def timing(self, link_bytes_per_s: float | None = None) -> ProfileTiming:
        """`precision.base.Timing`; link_bytes_per_s: of an emulated link, None: the disk that was measured."""
        return ProfileTiming(self, link_bytes_per_s)

    def costs(self, link_bytes_per_s: float | None = None) -> list[list[float]]:
        """`cache.SlotRequest.costs`: seconds that a decoding step loses in each layer by the experts it caches.

        Of the misses that LRU has there, what cross-layer prefetching does not hide (`lost_s`). A layer's lead is the
        compute of the one before it; the first layer is foretold from the last one of the token before.
        """
        timing = self.timing(link_bytes_per_s)
        costs = []
        for at, layer in enumerate(self.layers):
            lead_s = timing.compute_s((at - 1) % len(self.layers), 1)
            transfer_s = timing.transfer_s(at, Precision.FULL)
            costs.append([lost_s(misses, transfer_s, lead_s, layer.recall or 0.0) for misses in layer.misses])
        return costs

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}


def lost_s(misses: float, transfer_s: float, lead_s: float, recall: float) -> float:
    """Seconds that `misses` experts, expected in one layer of one decoding step, delay it.

    They take misses * transfer_s. Of that, prefetching hides what the gate names (recall) and what fits in the lead,
    which a step has once however many it misses: recall * min(misses * transfer_s, min(misses, 1) * lead_s). What is
    hidden still costs a share OCCUPANCY of itself. Grows with `misses`.
    """
    hidden_s = recall * min(misses * transfer_s, min(misses, 1.0) * lead_s)
    return misses * transfer_s - (1 - OCCUPANCY) * hidden_s


@dataclass(frozen=True)
class ProfileTiming:
    """A profile as `precision.base.Timing`, on the disk it was measured on or on a link of given speed."""

    profile: Profile
    link_bytes_per_s: float | None = None

    def compute_s(self, layer: int, tokens: int) -> float:
        """Between two measured numbers of tokens on the straight line; beyond the last along the last one, which is
        taken as level where noise made it fall."""
        known, seconds = self.profile.tokens, self.profile.layers[layer].compute_s
        if len(known) == 1 or tokens <= known[0]:
            return seconds[0]
        right = min(bisect_left(known, tokens), len(known) - 1)
        slope = (seconds[right] - seconds[right - 1]) / (known[right] - known[right - 1])
        if tokens > known[-1]:
            return seconds[-1] + max(slope, 0.0) * (tokens - known[-1])
        return seconds[right - 1] + slope * (tokens - known[right - 1])

    def transfer_s(self, layer: int, precision: Precision) -> float:
        """INT2 takes as long as all of the record where the store has no INT2."""
        of_layer = self.profile.layers[layer]
        seconds, num_bytes = of_layer.full_s, of_layer.full_bytes
        if precision is Precision.INT2 and of_layer.int2_s is not None and of_layer.int2_bytes is not None:
            seconds, num_bytes = of_layer.int2_s, of_layer.int2_bytes
        return seconds if self.link_bytes_per_s is None else num_bytes / self.link_bytes_per_s


@dataclass(frozen=True)
class Reading:
    """What was found. Either `profile`, with the file it is from, or `why_not` in a few words (" ... it is ...")."""

    profile: Profile | None = None
    path: Path | None = None
    why_not: str = ""


MISSING = Reading(why_not="there is none yet")


def read_profile(store: Path, header: StoreHeader) -> Reading:
    """The profile of a store that holds here and now, beside the store or else in the cache directory."""
    machine = Machine.current(store)
    readings = [_read(path, header, machine) for path in _places(store, header.fingerprint)]
    valid = (reading for reading in readings if reading.profile is not None)
    refused = (reading for reading in readings if reading is not MISSING)
    return next(valid, None) or next(refused, MISSING)


def write_profile(profile: Profile, store: Path) -> Path:
    """Keep `profile` beside the store, in the cache directory where that cannot be written; returns the file.

    A reader sees the old file or the new one, never a part. Raises OSError where neither can be written.
    """
    beside, cached = _places(store, profile.fingerprint)
    text = json.dumps(profile.to_json(), indent=1) + "\n"
    try:
        replace_file(beside, text)
        return beside
    except OSError:
        cached.parent.mkdir(parents=True, exist_ok=True)
        replace_file(cached, text)
        return cached


def why_stale(profile: Profile, header: StoreHeader, machine: Machine) -> str:
    """In a few words, why a profile says nothing about this store on this machine; empty where it does."""
    if profile.fingerprint != header.fingerprint:
        return "it is of another store"
    if profile.machine != machine:
        return f"it is of another machine ({profile.machine})"
    if [len(layer.misses) - 1 for layer in profile.layers] != [layer.num_experts for layer in header.layers]:
        return "it is damaged (it has other layers than the store)"
    return ""


def _places(store: Path, fingerprint: str) -> tuple[Path, Path]:
    return store / PROFILE_FILE, cache_directory() / "profiles" / f"{Path(fingerprint).name}.json"


def _read(path: Path, header: StoreHeader, machine: Machine) -> Reading:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return MISSING
    except (OSError, UnicodeDecodeError) as error:
        return Reading(path=path, why_not=f"it cannot be read ({error})")
    try:
        raw = json.loads(text)
        version = raw.pop("version")
        if version != VERSION:
            return Reading(path=path, why_not=f"it is of version {version!r}, not {VERSION}")
        profile = _decode(raw)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Reading(path=path, why_not="it is damaged")
    reason = why_stale(profile, header, machine)
    return Reading(path=path, why_not=reason) if reason else Reading(profile, path)


def _decode(raw: dict[str, Any]) -> Profile:
    """Inverse of `to_json` less the version; raises ValueError, TypeError, KeyError or AttributeError."""
    layers = tuple(LayerProfile(**{name: _frozen(value) for name, value in layer.items()}) for layer in raw["layers"])
    fields = {name: _frozen(value) for name, value in raw.items()}
    return Profile(**{**fields, "machine": Machine(**raw["machine"]), "layers": layers})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _processor() -> str:
    lines: Iterator[str] = iter(Path("/proc/cpuinfo").read_text().splitlines())
    names = (match[1] for line in lines if (match := re.match(r"model name\s*:\s*(.+)", line)))
    return next(names, platform.processor() or platform.machine())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
