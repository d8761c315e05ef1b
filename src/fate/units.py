"""Sizes, speeds and shares as people write them, and back.

>>> format_bytes(parse_memory("1.5GiB"))
'1.50 GiB'
>>> parse_link("12GB/s")
12000000000.0
>>> parse_experts("25%", 960)
240
"""

from __future__ import annotations

import math
import re

from fate.errors import ExpertShareError, LinkSpeedError, MemorySizeError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[_letter] = 1024**_power

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_SPEED = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B/s\s*")
MIB = 1024**2
GIB = 1024**3


def parse_memory(value: str | int | float) -> int:
    """Bytes from "6GiB", "900MB", "4G" (binary) or a number of bytes; raises MemorySizeError."""
    if isinstance(value, bool):
        raise MemorySizeError(value)
    if isinstance(value, (int, float)):
        size = float(value)
    else:
        match = _SIZE.fullmatch(value)
        if match is None or match[2].upper() not in _UNITS:
            raise MemorySizeError(value)
        size = float(match[1]) * _UNITS[match[2].upper()]
    if not math.isfinite(size) or size < 1:
        raise MemorySizeError(value)
    return int(size)


def format_bytes(size: float) -> str:
    """1536 MiB -> '1.50 GiB'."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def format_memory_argument(size: int) -> str:
    """`size` rounded up to whole MiB in the form `--memory` takes."""
    return f"{math.ceil(size / MIB)}MiB"


def parse_link(value: str | int | float) -> float:
    """Bytes per second from "12GB/s", "1.5 GB/s", "800MB/s" (powers of ten), "1GiB/s" or a number; raises
    LinkSpeedError for anything that is no positive speed."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        speed = float(value)
    elif isinstance(value, str) and (match := _SPEED.fullmatch(value)) is not None and (match[2] or not match[3]):
        speed = float(match[1]) * (1024.0 if match[3] else 1000.0) ** " KMGT".index(match[2].upper() or " ")
    else:
        raise LinkSpeedError(value)
    if not math.isfinite(speed) or speed < 1:
        raise LinkSpeedError(value)
    return speed


def parse_experts(value: str | int | float | None, total: int) -> int | None:
    """Expert slots from "25%", 0.25 or 360; raises ExpertShareError for anything that is not a positive share."""
    if value is None:
        return None
    text = str(value).strip()
    try:
        number = float(text[:-1]) / 100 * total if text.endswith("%") else float(text)
    except ValueError:
        raise ExpertShareError(value) from None
    if not text.endswith("%") and ("." in text or isinstance(value, float)):
        number *= total
    if not math.isfinite(number) or number <= 0:
        raise ExpertShareError(value)
    return min(max(1, round(number)), total)
