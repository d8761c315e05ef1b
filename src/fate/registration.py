"""The store's format, made known to transformers when transformers is imported: before or after us, by whomever.

transformers has no entry points for quantizers, and its registry is a module that takes seconds to import. So where it
is not imported yet, a finder waits for that one module (`sys.meta_path`, as importlib documents it): it has the module
found and run as always, then registers. Nothing of transformers is changed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register now if transformers' registry is there, else as soon as it is."""
    if REGISTRY in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, RegistryFinder())


def register() -> None:
    import fate.engine.quantizer  # noqa: F401 - it registers itself


class RegistryFinder(MetaPathFinder):
    """Stays: the module's first import may fail, and another thread may be searching `sys.meta_path`."""

    _busy = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY or self._busy:
            return None
        self._busy = True  # the search below comes here too
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Loads the registry by its own loader, which it is known by from then on."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        register()
