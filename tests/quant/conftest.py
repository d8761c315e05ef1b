"""Quantizer tests run once compiled and once in torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fate.kernels import native


@pytest.fixture(params=["compiled", "torch"])
def quantizer(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which implementation `fate.quant.nested` uses during the test."""
    if request.param == "compiled" and native.available() == ("torch",):
        pytest.skip("the compiled extension is missing")
    before = native.active().name
    native.select("portable" if request.param == "compiled" else "torch")
    yield request.param
    native.select(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These products are too small to share out; tests that want more threads set them, and this puts them back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
