"""Precision policies; one file each, found by name in PRECISIONS."""

from fate.precision import uniform  # noqa: F401 - registers itself
from fate.precision.base import PRECISIONS, PrecisionPolicy

__all__ = ["PRECISIONS", "PrecisionPolicy"]
