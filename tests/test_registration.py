"""The store's format is known to transformers whenever its registry is imported, also at the second try."""

import importlib
import sys

import pytest

from fate import registration


def test_a_registry_whose_first_import_fails_is_met_again(tmp_path, monkeypatch):
    (tmp_path / "fragile_registry.py").write_text(
        "import builtins\n"
        "builtins.tries = getattr(builtins, 'tries', 0) + 1\n"
        "if builtins.tries == 1:\n"
        "    raise KeyboardInterrupt\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "REGISTRY", "fragile_registry")
    others = [finder for finder in sys.meta_path if not isinstance(finder, registration.RegistryFinder)]
    monkeypatch.setattr(sys, "meta_path", others)
    registered = []
    monkeypatch.setattr(registration, "register", lambda: registered.append("fragile_registry" in sys.modules))
    registration.register_with_transformers()
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module("fragile_registry")
    assert not registered
    module = importlib.import_module("fragile_registry")
    assert registered == [True]
    assert module.__loader__ is module.__spec__.loader
    assert type(module.__loader__).__name__ == "SourceFileLoader"
