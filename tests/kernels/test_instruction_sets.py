"""The kernels of every instruction set give the same bits: of those that this machine has among each other, and of NEON
under an emulator, where there is one."""

from __future__ import annotations

import platform
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
FLAGS = ["-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
X86_SETS = {
    "kAvx2Tiles": ("avx2", _AVX2),
    "kAvxVnniTiles": ("avx-vnni", [*_AVX2, "-mavxvnni"]),
    "kAvx512VnniTiles": ("avx512-vnni", [*_AVX2, *_AVX512]),
}
NEON_SETS = {"kNeonTiles": ("neon", []), "kNeonDotprodTiles": ("neon-dotprod", ["-march=armv8.2-a+dotprod"])}


@pytest.mark.parametrize("codec, precision", DEPTHS)
def test_products_have_the_portable_bits(compiled_kernel: str, codec: str, precision: Precision) -> None:
    for cols in (64, 100, 1408, 2048):
        layout = matrix_layout(codec, 150, cols)
        record = random_record(layout)
        x = torch.randn(40, cols, generator=torch.Generator().manual_seed(cols))
        x[3] *= 1e30  # what rounds in a sum of very different terms
        for tokens in (1, 3, 8, 40):
            ours = linear(x[:tokens], record, layout, 0, precision)
            with native.selected("portable"):
                portable = linear(x[:tokens], record, layout, 0, precision)
            assert torch.equal(ours, portable), f"{cols} columns, {tokens} tokens"


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


def build_driver(compiler: list[object], sets: dict[str, tuple[str, list[str]]], folder: Path) -> Path:
    """`compare_tiles.cpp` with instruction sets: the constant to define -> name, flags."""
    objects = []
    for constant, (name, flags) in sets.items():
        objects.append(folder / f"{name}.o")
        defines = [f"-DFATE_TILES={constant}", f'-DFATE_TILES_NAME="{name}"']
        run(*compiler, *flags, *defines, "-c", SOURCES / "tiles_simd.cpp", "-o", objects[-1])
    others = [SOURCES / f"{name}.cpp" for name in ("tiles", "tiles_portable", "activations", "team")]
    run(*compiler, "-pthread", DRIVER, *others, *objects, "-o", folder / "compare_tiles")
    return folder / "compare_tiles"


@pytest.fixture(scope="module")
def neon_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(CROSS) is None or shutil.which(EMULATOR) is None:
        pytest.skip(f"needs {CROSS} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)")
    compiler = [CROSS, *FLAGS, "-O3", "-Werror", "-static", "-DFATE_ARM", f"-I{SOURCES}"]
    return build_driver(compiler, NEON_SETS, tmp_path_factory.mktemp("neon"))


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64") or shutil.which("g++") is None, reason="x86 and g++")
def test_x86_has_the_portable_bits_in_every_tail_and_pass(tmp_path: Path) -> None:
    """Rows and bands at every number of groups and tokens, whichever of them would be used."""
    compiler = ["g++", *FLAGS, "-w", "-O0", "-DFATE_X86", f"-I{SOURCES}"]  # compiling is what takes long
    names = run(build_driver(compiler, X86_SETS, tmp_path)).split()
    assert names == [name for name in native.available() if name != "torch"]


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
