"""Stores that the runtime's tests load, made once a session."""

from pathlib import Path

import pytest
import torch

import fate

MINI = Path(__file__).resolve().parents[2] / "assets" / "mini-moe"


@pytest.fixture(scope="session")
def mini_store(tmp_path_factory):
    """The embedded model with nested INT4 experts and 8-bit dense weights."""
    return fate.convert(MINI, tmp_path_factory.mktemp("stores") / "mini")


@pytest.fixture(scope="session")
def prompt():
    """Token ids [1, 48] below 256, the same for every model."""
    return torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(3))
