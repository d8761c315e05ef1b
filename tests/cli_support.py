"""What the command line's tests share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fate.plan.profile import PROFILE_FILE

FAMILY = "qwen2_moe"


class Result(SimpleNamespace):
    """Exit code and output of one command; `json`: the last line of its standard output."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


Cli = Callable[..., Result]
Refuse = Callable[..., str]


def copied(source: Path, to: Path) -> Path:
    """A store of one's own, without what another test may have measured beside it."""
    return Path(shutil.copytree(source, to, ignore=shutil.ignore_patterns(PROFILE_FILE)))


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ 0x40]))
