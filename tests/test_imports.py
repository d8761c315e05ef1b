"""Imports go downward only: the layer table below, enforced over every module of `src/fate`.

A module belongs to its longest prefix in the table, may import its own layer and every layer below it, and may not be
imported before it has a place. Imports under `if TYPE_CHECKING` do not run and are not counted; imports inside
functions are.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

# Lowest first. `fate` itself stands for the package's `__init__` alone, not for everything under it.
LAYERS: dict[str, tuple[str, ...]] = {
    "values": ("fate.core", "fate.errors"),
    "foundation": ("fate.registry", "fate.units", "fate.fileio", "fate.directories"),
    "store format": ("fate.store.format", "fate.store.files", "fate.store.ahead"),
    "plan": ("fate.plan.budget", "fate.plan.machine"),
    "policies": (
        "fate.cache",
        "fate.predict",
        "fate.precision",
        "fate.transfer.link",
        "fate.transfer.scheduler",
        "fate.trace",
    ),
    "simulation": ("fate.sim",),
    "torch": ("fate.store", "fate.kernels", "fate.models", "fate.transfer"),
    "engine": (
        "fate.convert",
        "fate.synth",
        "fate.synth_routing",
        "fate.synth_checkpoint",
        "fate.engine",
        "fate.plan",
        "fate.systems",
        "fate.diagnosis",
        "fate.evaluate",
        "fate.inspection",
        "fate.profile",
        "fate.profiling",
        "fate.similarity",
        "fate.explanation",
    ),
    "public API": ("fate", "fate.loading", "fate.registration"),
    "front ends": ("fate.cli", "fate.server", "fate.bench"),
}
FIRST_TORCH_LAYER = "torch"

STDLIB_ONLY = ("fate.core", "fate.errors", "fate.registry", "fate.store.format")
TORCH_PACKAGES = frozenset({"torch", "transformers", "safetensors", "accelerate", "hqq"})

# A predictor may be torch-free (then the simulator can run it) or not. One that imports torch counts as a module of
# the torch layer, so nothing torch-free can import it, and a new predictor needs no entry here.
TORCH_IF_IMPORTED = ("fate.predict",)
ALWAYS_TORCH_FREE = ("fate.predict", "fate.predict.base")

# Same layer, but only the engine may know both.
STRANGERS = (("fate.cache", "fate.predict"), ("fate.predict", "fate.cache"))

# Upward imports that are allowed inside a function, each with its reason.
LAZY_UPWARD: dict[tuple[str, str], str] = {}

SOURCE = Path(__file__).resolve().parents[1] / "src"


@dataclass(frozen=True)
class Module:
    """One parsed module. `is_package`: it is an `__init__`, which changes what a relative import means."""

    name: str
    tree: ast.Module
    is_package: bool = False


@dataclass(frozen=True)
class Import:
    """`target` is a dotted module (`fate.` ones resolved to the longest that exists); `lazy`: inside a function."""

    target: str
    line: int
    lazy: bool


class _ImportCollector(ast.NodeVisitor):
    def __init__(self, module: Module, known: frozenset[str]) -> None:
        self._module = module
        self._known = known
        self._depth = 0
        self.found: list[Import] = []

    def visit_If(self, node: ast.If) -> None:
        runs = node.orelse if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING") else None
        for child in ast.iter_child_nodes(node) if runs is None else runs:
            self.visit(child)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef
    visit_Lambda = visit_FunctionDef

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
        self.found.append(Import(target, line, lazy=self._depth > 0))


def imports_of(module: Module, known: frozenset[str]) -> list[Import]:
    collector = _ImportCollector(module, known)
    collector.visit(module.tree)
    return collector.found


def within(name: str, prefix: str) -> bool:
    return name == prefix or (prefix != "fate" and name.startswith(prefix + "."))


def layer_of(name: str) -> int | None:
    """Index into LAYERS of the longest prefix of `name`, None where the table has none."""
    places = [(len(prefix), at) for at, layer in enumerate(LAYERS.values()) for prefix in layer if within(name, prefix)]
    return max(places)[1] if places else None


def is_torch(target: str) -> bool:
    return target.split(".")[0] in TORCH_PACKAGES


def violations(modules: Mapping[str, Module]) -> list[str]:
    """One line per broken rule, `importer:line: what is wrong`; empty for a sound tree."""
    known = frozenset(modules)
    imports = {name: imports_of(module, known) for name, module in modules.items()}
    first_torch_layer = list(LAYERS).index(FIRST_TORCH_LAYER)
    layers: dict[str, int] = {}
    found = []
    for name in modules:
        layer = layer_of(name)
        if layer is None:
            found.append(f"{name}: has no place in LAYERS")
            continue
        by_choice = name not in ALWAYS_TORCH_FREE and any(within(name, prefix) for prefix in TORCH_IF_IMPORTED)
        if by_choice and any(is_torch(edge.target) for edge in imports[name]):
            layer = first_torch_layer
        layers[name] = layer
    for name, layer in layers.items():
        for edge in imports[name]:
            problem = _problem(name, layer, edge, layers, torch_allowed=layer >= first_torch_layer)
            if problem:
                found.append(f"{name}:{edge.line}: {problem}")
    return found


def _problem(name: str, layer: int, edge: Import, layers: Mapping[str, int], torch_allowed: bool) -> str | None:
    """What is wrong with one import of the module `name`, or None."""
    target = edge.target
    if not within(target.split(".")[0], "fate"):
        if name in STDLIB_ONLY and target.split(".")[0] not in sys.stdlib_module_names:
            return f"imports {target}, but is standard library only"
        return f"imports {target}, but is torch-free" if is_torch(target) and not torch_allowed else None
    if edge.lazy and (name, target) in LAZY_UPWARD:
        return None
    if any(within(name, one) and within(target, other) for one, other in STRANGERS):
        return f"imports {target}: these two packages never import each other"
    target_layer = layers.get(target, layer_of(target))
    if target_layer is None:
        return f"imports {target}, which has no place in LAYERS"
    if target_layer > layer:
        names = list(LAYERS)
        return f"imports {target}: {names[layer]} may not import {names[target_layer]}"
    return None


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
    """The violations that `source`, added to the real tree as the module `name`, brings with it."""
    tree = load_tree()
    before = violations(tree)
    tree[name] = Module(name, ast.parse(source))
    return [line for line in violations(tree) if line not in before]


def test_imports_go_downward() -> None:
    tree = load_tree()
    assert {"fate", "fate.core", "fate.store.format", "fate.store.packing"} <= tree.keys()
    assert violations(tree) == []


def test_every_lazy_upward_import_is_still_needed() -> None:
    tree = load_tree()
    known = frozenset(tree)
    needed = {(name, edge.target) for name, module in tree.items() for edge in imports_of(module, known) if edge.lazy}
    assert needed.issuperset(LAZY_UPWARD)


@pytest.mark.parametrize(
    "name, source, complaint",
    [
        ("fate.cache.planted", "import fate.engine", "policies may not import engine"),
        ("fate.cache.planted", "from fate import engine", "policies may not import engine"),
        ("fate.cache.planted", "from ..engine import x", "policies may not import engine"),
        ("fate.cache.planted", "def f():\n    from fate import load", "policies may not import public API"),
        (
            "fate.kernels.planted",
            "import importlib\nimportlib.import_module('fate.cli')",
            "torch may not import front ends",
        ),
        ("fate.engine.planted", "if x:\n    import fate.cli", "engine may not import front ends"),
        ("fate.store.format", "import fate.store", "store format may not import torch"),
        ("fate.sim.planted", "from fate.store.packing import chunks", "simulation may not import torch"),
        ("fate.core", "from fate.units import parse_memory", "values may not import foundation"),
        ("fate.errors", "from fate.units import format_bytes", "values may not import foundation"),
        ("fate.core", "import numpy", "standard library only"),
        ("fate.cache.planted", "import torch.nn as nn", "is torch-free"),
        ("fate.precision.planted", "def f():\n    from transformers import AutoConfig", "is torch-free"),
        ("fate.predict.base", "import torch", "is torch-free"),
        ("fate.transfer.scheduler", "from safetensors.torch import load_file", "is torch-free"),
        ("fate.cache.planted", "from fate.predict import base", "never import each other"),
        ("fate.predict.planted", "import fate.cache", "never import each other"),
        ("fate.utils", "", "has no place in LAYERS"),
        ("fate.cli.planted", "import fate.utils", "has no place in LAYERS"),
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
    assert violations(tree) == [
        *violations(load_tree()),
        "fate.sim.planted:1: imports fate.predict.planted: simulation may not import torch",
    ]
