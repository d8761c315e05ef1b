"""Where Fate keeps what it makes for itself."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Converted stores, and profiles of stores that cannot be written: `$FATE_CACHE`, else `$XDG_CACHE_HOME/fate`, else
    `~/.cache/fate`."""
    if override := os.environ.get("FATE_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fate"
