"""The kernels of every instruction set give the same bits: of those that this machine has among each other, and of NEON
under an emulator, where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fate.core import Precision
from fate.kernels import experts, linear, native
from packed_records import DEPTHS, expert_layout, matrix_layout, random_record

SOURCES = Path(native.__file__).parent / "cpu"
DRIVER = Path(__file__).parent / "compare_tiles.cpp"
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
NEON_SETS = {"kNeonTiles": ("neon", []), "kNeonDotprodTiles": ("neon-dotprod", ["-march=armv8.2-a+dotprod"])}


@pytest.mark.parametrize("codec, precision", DEPTHS)
@pytest.mark.parametrize("cols", [64, 100, 1408, 2048])
def test_products_have_the_portable_bits(compiled_kernel: str, codec: str, precision: Precision, cols: int) -> None:
    layout = matrix_layout(codec, 150, cols)
    record = random_record(layout)
    x = torch.randn(40, cols, generator=torch.Generator().manual_seed(cols))
    x[3] *= 1e30  # what rounds in a sum of very different terms
    for tokens in (1, 3, 8, 40):
        ours = linear(x[:tokens], record, layout, 0, precision)
        with native.selected("portable"):
            assert torch.equal(ours, linear(x[:tokens], record, layout, 0, precision)), f"{tokens} tokens"


@pytest.mark.parametrize("codec, precision", DEPTHS)
def test_experts_have_the_portable_bits(compiled_kernel: str, codec: str, precision: Precision) -> None:
    layout = expert_layout(codec, 192, 100)
    record = random_record(layout)
    x = torch.randn(33, 192, generator=torch.Generator().manual_seed(0))
    pairs = torch.stack((torch.arange(33), torch.zeros(33)), dim=1).int()

    def rows() -> Tensor:
        out = torch.empty(33, 1, 192)
        experts(x, record, layout, [0], [precision], [0, 33], pairs, out)
        return out

    ours = rows()
    with native.selected("portable"):
        assert torch.equal(ours, rows())


@pytest.fixture(scope="module")
def neon_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`compare_tiles.cpp` built for aarch64 with both NEON sets."""
    if shutil.which(CROSS) is None or shutil.which(EMULATOR) is None:
        pytest.skip(f"needs {CROSS} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)")
    built = tmp_path_factory.mktemp("neon")
    compiler = [CROSS, *FLAGS, "-DFATE_ARM", f"-I{SOURCES}"]
    objects = []
    for constant, (name, flags) in NEON_SETS.items():
        objects.append(built / f"{name}.o")
        defines = [f"-DFATE_TILES={constant}", f'-DFATE_TILES_NAME="{name}"']
        run(*compiler, *flags, *defines, "-c", SOURCES / "tiles_simd.cpp", "-o", objects[-1])
    others = [SOURCES / f"{name}.cpp" for name in ("tiles", "tiles_portable", "activations", "team")]
    run(*compiler, "-static", "-pthread", DRIVER, *others, *objects, "-o", built / "compare_tiles")
    return built / "compare_tiles"


def run(*argv: object) -> str:
    result = subprocess.run([str(argument) for argument in argv], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "processor, names", [("cortex-a53", ["neon", "portable"]), ("max", ["neon-dotprod", "neon", "portable"])]
)
def test_neon_has_the_portable_bits(neon_driver: Path, processor: str, names: list[str]) -> None:
    assert run(EMULATOR, "-cpu", processor, neon_driver).split() == names
