"""The files of a store: their names, and the small ones that are read whole. Without torch.

>>> is_store("assets")
False
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fate.errors import ChecksumError, StoreError
from fate.fileio import open_direct

EXPERTS_FILE = "experts.fate"
DENSE_FILE = "dense.safetensors"
PACKED_FILE = "packed.safetensors"
CHECKSUMS_FILE = "checksums.json"
HEADER_KEY = "__header__"  # in a file's checksums: its length field and header


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory laid out as a store (its content may still be damaged)."""
    return (Path(path) / EXPERTS_FILE).is_file()


def read_config(path: Path) -> dict[str, Any]:
    """The store's config.json; raises StoreError where it is missing or does not belong to a store."""
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path / 'config.json'} cannot be read ({error}): convert the checkpoint again") from None
    if config.get("quantization_config", {}).get("quant_method") != "fate":
        raise StoreError(f"{path / 'config.json'} is not a Fate store's: convert the checkpoint again")
    return config


def read_checksums(path: Path, name: str) -> dict[str, str]:
    """The checksums of the tensors of one file, and of its header (HEADER_KEY)."""
    try:
        table: dict[str, str] = json.loads((path / CHECKSUMS_FILE).read_text())[name]
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{path / CHECKSUMS_FILE} cannot be read ({error}): convert the checkpoint again") from None
    return table


def check_tensor(path: Path, name: str, expected: str | None, got: int) -> None:
    """Raise ChecksumError unless `got` is what was written down of the tensor `name` of the file `path`."""
    if expected != f"{got:016x}":
        raise ChecksumError(f"{path}: {name} is damaged (checksum differs): convert the checkpoint again")


def open_past_cache(file: Path) -> tuple[int, bool]:
    """`fileio.open_direct`, but that a file which cannot be opened is a StoreError."""
    try:
        return open_direct(file)
    except OSError as error:
        raise StoreError(f"{file} cannot be opened: {error.strerror}") from None
