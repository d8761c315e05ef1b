"""Precision policies; one file each, found by name in PRECISIONS."""

from fate.precision import popularity, uniform  # noqa: F401 - register themselves
from fate.precision.base import PRECISIONS, PrecisionPolicy

__all__ = ["PRECISIONS", "PrecisionPolicy"]
