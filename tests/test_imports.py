"""Imports go downward only, from room to room: a room is a folder of `src/fate`, or a module beside the folders.

ROOMS lists them, lowest first. A module may import its own room and those of lines before it; rooms of one line never
import each other. So no two rooms import each other in both directions, and a new room fails until it has a place.
Imports under `if TYPE_CHECKING` do not run and are not counted; imports inside functions are.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

# "fate" is the package's own `__init__`: the public API.
ROOMS: tuple[tuple[str, ...], ...] = (
    ("core", "errors", "fileio", "directories"),
    ("units", "registry"),
    ("trace",),
    ("cache", "predict", "precision"),
    ("sim", "systems"),
    ("store",),
    ("kernels",),
    ("models",),
    ("convert",),
    ("plan",),
    ("transfer",),
    ("engine",),
    ("registration", "tools"),
    ("load",),
    ("fate",),
    ("bench", "server"),
    ("cli",),
)
STDLIB_ONLY = (
    "fate.core",
    "fate.errors",
    "fate.fileio",
    "fate.units",
    "fate.registry",
    "fate.store.format",
    "fate.store.tensorheader",
)

# Rooms without torch, and modules without it in rooms that have it. They import each other only. A predictor may need
# torch or not; one that does counts with what has it, so nothing without torch can import it.
TORCH_PACKAGES = frozenset({"torch", "transformers", "safetensors", "accelerate", "hqq"})
TORCH_FREE = (
    *(f"fate.{room}" for line in ROOMS[:5] for room in line),
    "fate.store.format",
    "fate.store.files",
    "fate.store.tensorheader",
    "fate.store.ahead",
    "fate.plan.budget",
    "fate.plan.machine",
    "fate.transfer.link",
    "fate.transfer.scheduler",
)
TORCH_BY_CHOICE = "fate.predict"
ALWAYS_TORCH_FREE = ("fate.predict", "fate.predict.base")

SOURCE = Path(__file__).resolve().parents[1] / "src"


@dataclass(frozen=True)
class Module:
    """One parsed module. `is_package`: it is an `__init__`, which changes what a relative import means."""

    name: str
    tree: ast.Module
    is_package: bool = False


@dataclass(frozen=True)
class Import:
    """`target` is a dotted module (`fate.` ones resolved to the longest that exists)."""

    target: str
    line: int


class _ImportCollector(ast.NodeVisitor):
    def __init__(self, module: Module, known: frozenset[str]) -> None:
        self._module = module
        self._known = known
        self.found: list[Import] = []

    def visit_If(self, node: ast.If) -> None:
        runs = node.orelse if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING") else None
        for child in ast.iter_child_nodes(node) if runs is None else runs:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            package = self._module.name.split(".")[: None if self._module.is_package else -1]
            base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
        for alias in node.names:
            name = f"{base}.{alias.name}"
            self._add(name if name in self._known else base, node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        name, argument = ast.unparse(node.func), node.args[0] if node.args else None
        by_name = name.rpartition(".")[2] in ("import_module", "__import__")
        if by_name and isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            self._add(argument.value, node.lineno)
        self.generic_visit(node)

    def _add(self, target: str, line: int) -> None:
        self.found.append(Import(target, line))


def imports_of(module: Module, known: frozenset[str]) -> list[Import]:
    collector = _ImportCollector(module, known)
    collector.visit(module.tree)
    return collector.found


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def line_of(room: str) -> int | None:
    """Index into ROOMS, None where the room has no place."""
    return next((at for at, line in enumerate(ROOMS) if room in line), None)


def is_torch(target: str) -> bool:
    return target.split(".")[0] in TORCH_PACKAGES


def violations(modules: Mapping[str, Module], importers: Collection[str] | None = None) -> list[str]:
    """One line per rule that one of `importers` (None: any module) breaks, `importer:line: what is wrong`."""
    known = frozenset(modules)
    importers = modules if importers is None else importers
    imports = {
        name: imports_of(module, known)
        for name, module in modules.items()
        if name in importers or within(name, TORCH_BY_CHOICE)
    }
    torch_free = {name for name in modules if _is_torch_free(name, imports.get(name, []))}
    found = []
    for name in importers:
        if line_of(room_of(name)) is None:
            found.append(f"{name}: has no place in ROOMS")
            continue
        for edge in imports[name]:
            problem = _wrong_room(name, edge.target) or _wrong_package(name, edge.target, torch_free)
            if problem:
                found.append(f"{name}:{edge.line}: imports {edge.target}{problem}")
    return found


def _is_torch_free(name: str, imports: list[Import]) -> bool:
    by_choice = within(name, TORCH_BY_CHOICE) and name not in ALWAYS_TORCH_FREE
    if by_choice and any(is_torch(edge.target) for edge in imports):
        return False
    return any(within(name, prefix) for prefix in TORCH_FREE)


def _wrong_room(name: str, target: str) -> str | None:
    room, other = room_of(name), room_of(target)
    if not within(target, "fate") or room == other:
        return None
    line, lower = line_of(room), line_of(other)
    if lower is None:
        return ", which has no place in ROOMS"
    assert line is not None
    return None if lower < line else f": {room} may not import {other}"


def _wrong_package(name: str, target: str, torch_free: set[str]) -> str | None:
    outside = not within(target, "fate")
    if outside and name in STDLIB_ONLY and target.split(".")[0] not in sys.stdlib_module_names:
        return ", but is standard library only"
    if name not in torch_free:
        return None
    return ", but is torch-free" if is_torch(target) or not (outside or target in torch_free) else None


def load_tree() -> dict[str, Module]:
    """A fresh mapping, so that a test may plant modules in it."""
    return {module.name: module for module in _parsed()}


@cache
def _parsed() -> tuple[Module, ...]:
    modules = []
    for path in sorted((SOURCE / "fate").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules.append(Module(name, ast.parse(path.read_text(encoding="utf-8"), str(path)), is_package))
    return tuple(modules)


def planted(name: str, source: str) -> list[str]:
    """What `source` breaks as the module `name` of the real tree."""
    return violations({**load_tree(), name: Module(name, ast.parse(source))}, [name])


def test_imports_go_downward() -> None:
    tree = load_tree()
    assert {"fate", "fate.core", "fate.store.format", "fate.convert.encode"} <= tree.keys()
    assert violations(tree) == []


def test_every_room_but_one_to_come_is_there() -> None:
    rooms = {room_of(name) for name in load_tree()}
    assert {room for line in ROOMS for room in line} - rooms == {"server"}


@pytest.mark.parametrize("name", [*STDLIB_ONLY, *TORCH_FREE, TORCH_BY_CHOICE, *ALWAYS_TORCH_FREE])
def test_what_the_rules_name_is_there(name: str) -> None:
    assert name in load_tree()


@pytest.mark.parametrize(
    "name, source, complaint",
    [
        ("fate.cache.planted", "import fate.engine", "cache may not import engine"),
        ("fate.cache.planted", "from fate import engine", "cache may not import engine"),
        ("fate.cache.planted", "from ..engine import x", "cache may not import engine"),
        ("fate.cache.planted", "def f():\n    from fate import load", "cache may not import load"),
        ("fate.kernels.planted", "import importlib\nimportlib.import_module('fate.cli')", "kernels may not import cli"),
        ("fate.engine.planted", "if x:\n    import fate.cli", "engine may not import cli"),
        ("fate.store.planted", "from fate.kernels import native", "store may not import kernels"),
        ("fate.store.planted", "import fate.transfer.scheduler", "store may not import transfer"),
        ("fate.models.planted", "from fate.convert.checkpoint import Checkpoint", "models may not import convert"),
        ("fate.tools.planted", "def f():\n    from fate.load import load", "tools may not import load"),
        ("fate.core", "from fate.units import parse_memory", "core may not import units"),
        ("fate.errors", "def f():\n    from fate.units import format_bytes", "errors may not import units"),
        ("fate.cache.planted", "from fate.predict import base", "cache may not import predict"),
        ("fate.predict.planted", "import fate.cache", "predict may not import cache"),
        ("fate.core", "import numpy", "standard library only"),
        ("fate.units", "import numpy", "standard library only"),
        ("fate.store.format", "import numpy", "standard library only"),
        ("fate.cache.planted", "import torch.nn as nn", "is torch-free"),
        ("fate.precision.planted", "def f():\n    from transformers import AutoConfig", "is torch-free"),
        ("fate.predict.base", "import torch", "is torch-free"),
        ("fate.transfer.scheduler", "from safetensors.torch import load_file", "is torch-free"),
        ("fate.transfer.scheduler", "from fate.transfer.disk import DiskSource", "is torch-free"),
        ("fate.store.ahead", "from fate.store.packing import order", "is torch-free"),
        ("fate.plan.budget", "import fate.plan.needs", "is torch-free"),
        ("fate.utils", "", "has no place in ROOMS"),
        ("fate.cli.planted", "import fate.utils", "has no place in ROOMS"),
    ],
)
def test_a_planted_import_is_caught(name: str, source: str, complaint: str) -> None:
    found = planted(name, source)
    assert len(found) == 1
    assert complaint in found[0]
    assert found[0].startswith(name)


@pytest.mark.parametrize(
    "name, source",
    [
        ("fate.cache.planted", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("fate.cache.planted", "import numpy\nfrom fate.core import ExpertKey\nfrom fate.cache import base"),
        ("fate.predict.planted", "import torch\nfrom fate.predict import base"),
        ("fate.engine.planted", "import fate.cache, fate.predict, fate.store.packing"),
        ("fate.cli.planted", "import fate\nfrom fate import bench"),
    ],
)
def test_a_sound_import_passes(name: str, source: str) -> None:
    assert planted(name, source) == []


def test_nothing_torch_free_may_import_a_predictor_that_needs_torch() -> None:
    tree = load_tree()
    tree["fate.predict.planted"] = Module("fate.predict.planted", ast.parse("import torch"))
    tree["fate.sim.planted"] = Module("fate.sim.planted", ast.parse("from fate.predict.planted import X"))
    assert violations(tree) == ["fate.sim.planted:1: imports fate.predict.planted, but is torch-free"]
