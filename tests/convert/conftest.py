"""Quantizer tests run once compiled and once in torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fate.kernels import native


@pytest.fixture(params=["compiled", "torch"])
def quantizer(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which implementation `fate.convert.encode` uses during the test."""
    if request.param == "compiled" and native.available() == ("torch",):
        pytest.skip("the compiled extension is missing")
    before = native.active().name
    native.select("portable" if request.param == "compiled" else "torch")
    yield request.param
    native.select(before)
