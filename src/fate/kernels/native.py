"""The compiled extension: whether it is there, which instruction set it uses, and each layout as it wants it.

`select` is for tests and diagnostics; everything else calls the functions of `fate.kernels`.
"""

from __future__ import annotations

import atexit
import platform
from dataclasses import dataclass
from typing import Any

import torch

from fate.errors import UnknownNameError
from fate.kernels import threads
from fate.store.format import RecordLayout

try:
    from fate.kernels.cpu import _cpu as _built

    _cpu: Any = _built
    _missing = ""
except ImportError as error:
    _cpu = None
    _missing = f"the compiled kernels are missing ({error}); reinstall fate-moe with a C++20 compiler at hand"

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_RECORDS = 4096

_extension: Any = _cpu
_records: dict[int, tuple[RecordLayout, Any]] = {}
atexit.register(_records.clear)  # the extension complains of what outlives it


@dataclass(frozen=True)
class KernelInfo:
    """Which kernels run. `name`: "avx512-vnni", "portable" or "torch"; `detail`: one line on why, for people."""

    name: str
    threads: int
    detail: str


def active() -> KernelInfo:
    """The kernels that quantized codecs run on now; raw codecs always use torch's matrix products."""
    num_threads = threads.count()
    if _extension is None:
        return KernelInfo("torch", num_threads, _missing or "chosen: dequantize, then torch's matrix product")
    name = _extension.kernel_name()
    if name == "portable":
        detail = f"plain C++ on {platform.machine()}, activations in int8"
    else:
        detail = "AVX-512 with VNNI, activations in int8"
    return KernelInfo(name, num_threads, detail)


def available() -> tuple[str, ...]:
    """Names `select` takes on this machine, the default first."""
    if _cpu is None:
        return ("torch",)
    current = _cpu.kernel_name()
    _cpu.select_kernels("")
    names = tuple(dict.fromkeys((_cpu.kernel_name(), "portable", "torch")))
    _cpu.select_kernels(current)
    return names


def select(name: str) -> None:
    """Use the kernels called `name` from now on, in the whole process; UnknownNameError if they cannot run here."""
    global _extension
    if name not in available():
        raise UnknownNameError("kernel", name, available())
    if name == "torch":
        _extension = None
    else:
        _cpu.select_kernels(name)
        _extension = _cpu


def extension() -> Any:
    """The extension module, or None where torch does the work."""
    return _extension


def record(layout: RecordLayout) -> Any:
    """`layout` as the extension's own object, built once: looked up by identity, which is cheaper than hashing."""
    entry = _records.get(id(layout))
    if entry is None:
        if len(_records) >= _MAX_RECORDS:
            _records.clear()
        entry = _records[id(layout)] = (layout, _make_record(layout))
    return entry[1]


def _make_record(layout: RecordLayout) -> Any:
    places = [
        (spec.rows, spec.cols, section.high, section.affine, section.low or 0)
        for spec, section in zip(layout.matrices, layout.sections)
    ]
    return _cpu.Record.make(layout.codec == "int8", layout.record_bytes, places)
