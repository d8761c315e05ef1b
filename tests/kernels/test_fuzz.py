"""A short run of `make fuzz`, and proof that it would notice."""

from __future__ import annotations

import pytest
import torch

import kernel_fuzz
from fate.kernels import native


def test_random_calls(compiled_kernel: str) -> None:
    made = kernel_fuzz.fuzz(rounds=25, first_seed=1, kernel=compiled_kernel)
    assert len(made) == 2
    assert min(made.values()) >= 5


@pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")
@pytest.mark.parametrize("name", ["linear", "experts"])
def test_a_wrong_kernel_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(kernel_fuzz, name)

    def wrong(*arguments: object) -> object:
        out = right(*arguments)
        rows = arguments[7] if name == "experts" else out
        assert isinstance(rows, torch.Tensor)
        rows.mul_(1.02)
        return out

    monkeypatch.setattr(kernel_fuzz, name, wrong)
    with pytest.raises(AssertionError, match=r"seed \d+, .* times the bound"):
        kernel_fuzz.fuzz(rounds=20, first_seed=1)
