"""Kernel tests run once per kernel this machine has; the ones it lacks are skipped by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fate.kernels import native


@pytest.fixture(params=["avx512-vnni", "portable", "torch"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the kernels in use during the test."""
    yield from _selected(request.param)


@pytest.fixture(params=["avx512-vnni", "portable"])
def compiled_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _selected(request.param)


def _selected(name: str) -> Iterator[str]:
    if name not in native.available():
        pytest.skip(f"this machine has no {name} kernels")
    before = native.active().name
    native.select(name)
    yield name
    native.select(before)
