"""Kernel tests run once per kernel this machine has; the ones it lacks are skipped by name."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest

from fate.kernels import native

ON_ARM = platform.machine() in ("aarch64", "arm64")
COMPILED = [*(("neon-dotprod", "neon") if ON_ARM else ("avx512-vnni", "avx-vnni", "avx2")), "portable"]


@pytest.fixture(params=[*COMPILED, "torch"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the kernels in use during the test."""
    yield from _selected(request.param)


@pytest.fixture(params=COMPILED)
def compiled_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _selected(request.param)


def _selected(name: str) -> Iterator[str]:
    if name not in native.available():
        pytest.skip(f"this machine has no {name} kernels")
    with native.selected(name):
        yield name
