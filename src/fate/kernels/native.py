"""The compiled extension: whether it is there, which instruction set it uses, and each layout as it wants it.

`select` and `selected` are for tests and benchmarks; everything else calls the functions of `fate.kernels`.

>>> with selected("avx2"):
...     linear(x, packed, layout)
"""

from __future__ import annotations

import atexit
import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fate.errors import UnknownNameError
from fate.kernels import threads
from fate.kernels.activation import KINDS, ExpertActivation
from fate.store.format import RecordLayout

try:
    from fate.kernels.cpu import _cpu as _built

    _cpu: Any = _built
    _missing = ""
except ImportError as error:
    _cpu = None
    _missing = (
        f"the compiled kernels are missing ({error}): torch does their work, many times slower; "
        "reinstall fate-moe with a C++20 compiler at hand"
    )

_INSTRUCTIONS = {
    "avx512-vnni": "AVX-512 with VNNI",
    "avx-vnni": "AVX2 with VNNI",
    "avx2": "AVX2",
    "neon-dotprod": "NEON with dot products",
    "neon": "NEON",
    "portable": f"plain C++ on {platform.machine()}",
}

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_RECORDS = 4096

_extension: Any = _cpu
_records: dict[int, tuple[RecordLayout, Any]] = {}
atexit.register(_records.clear)  # the extension complains of what outlives it


@dataclass(frozen=True)
class KernelInfo:
    """Which kernels run. `name`: an instruction set, "portable" or "torch"; `detail`: one line on why, for people."""

    name: str
    threads: int
    detail: str


def active() -> KernelInfo:
    """The kernels that quantized codecs run on now; raw codecs always use torch's matrix products."""
    num_threads = threads.count()
    if _extension is None:
        return KernelInfo("torch", num_threads, _missing or "chosen: dequantize, then torch's matrix product")
    name = _extension.kernel_name()
    return KernelInfo(name, num_threads, f"{_INSTRUCTIONS[name]}, activations in int8")


def available() -> tuple[str, ...]:
    """Names `select` takes on this machine, fastest first, which is the default."""
    return ("torch",) if _cpu is None else (*_cpu.available_kernels(), "torch")


def missing() -> str:
    """Why the extension is not there and what to do, in one line; empty where it is."""
    return _missing


def select(name: str) -> None:
    """Use the kernels called `name` from now on, in the whole process; UnknownNameError if they cannot run here."""
    global _extension
    if name not in available():
        raise UnknownNameError("instruction set", name, available())
    if name == "torch":
        _extension = None
    else:
        _cpu.select_kernels(name)
        _extension = _cpu


@contextmanager
def selected(name: str) -> Iterator[None]:
    """`select(name)`, and what was in use before again at the end."""
    before = active().name
    select(name)
    try:
        yield
    finally:
        select(before)


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


@functools.lru_cache(maxsize=256)
def activation(form: ExpertActivation) -> Any:
    """`form` as the extension's own object."""
    limits = (form.alpha, form.gate_max, form.act_max, form.up_limit, form.up_offset)
    return _cpu.ExpertActivation.make(KINDS.index(form.kind), form.gated, form.interleaved, *limits)


def _make_record(layout: RecordLayout) -> Any:
    places = [
        (spec.rows, spec.cols, section.high, section.affine, section.low or 0)
        for spec, section in zip(layout.matrices, layout.sections)
    ]
    return _cpu.Record.make(layout.codec == "int8", layout.record_bytes, places)
