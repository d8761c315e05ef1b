from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fate.errors import UnknownNameError
from fate.kernels import active, native
from fate.store.format import MatrixSpec, RecordLayout


def test_the_extension_was_built() -> None:
    info = active()
    assert info.name == native.available()[0] != "torch", info.detail
    assert info.threads == torch.get_num_threads()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_torch_and_the_kernels_share_one_thread_pool() -> None:
    lines = Path("/proc/self/maps").read_text().splitlines()
    libraries = {line.split()[-1] for line in lines if "/libgomp" in line}
    assert len(libraries) == 1


def test_kernels_are_selected_by_name(kernel: str) -> None:
    assert active().name == kernel
    assert active().detail


def test_the_selection_ends_with_its_block(kernel: str) -> None:
    def fail() -> None:
        with native.selected("portable"):
            assert active().name == "portable"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert active().name == kernel


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="portable"):
        native.select("avx1024")


def test_a_layout_is_converted_once() -> None:
    layout = RecordLayout("int4", (MatrixSpec("weight", 3, 64),))
    assert native.record(layout) is native.record(layout)
