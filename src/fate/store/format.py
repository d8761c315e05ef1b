"""The store's byte layout: the specification. Arithmetic only, no torch; `docs/store-format.md` is its prose.

A *matrix* is `[rows, cols]` with `cols` the reduction dimension. A *record* is everything one expert needs, in one
contiguous page-aligned run of bytes. Nested INT4 records put their INT2 version first::

    [ constants ][ high 2-bit planes ][ scales and offsets ][ low 2-bit planes ]   padded to PAGE_BYTES
      `------------------ INT2 prefix ---------------------'
      `------------------------------ INT4 ----------------------------------'

Codes `q = 4h + l` of a group of GROUP columns mean `gain * (a * q + b)`; an INT2 reader sees `h` alone and uses
`gain * slope * (a * (4h + 1.5) + b)`. A dense matrix is packed as a record of one matrix without page padding.

>>> RecordLayout("int4", (MatrixSpec("gate_up_proj", 2816, 2048), MatrixSpec("down_proj", 2048, 1408))).bits_per_weight
4.5
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from fate.core import Precision
from fate.errors import StoreError, StoreVersionError

MAGIC = b"FATESTOR"
FORMAT_VERSION = 2
MIXED_VERSION = 3  # of a store whose layers differ in codec; else it is what version 2 is
PAGE_BYTES = 4096
GROUP = 64  # columns that share one scale and one offset
ALIGN = 64  # every section starts on a cache line
CONSTANTS_BYTES = 64  # (gain, slope) float32 pairs, one per matrix
CHECKSUM_BYTES = 16  # xxh64 of the INT2 prefix, xxh64 of the rest, little endian
CODECS = ("int4", "int8", "bf16", "fp16", "fp32")
RAW_CODECS = {"bf16": ("BF16", 2), "fp16": ("F16", 2), "fp32": ("F32", 4)}  # safetensors' name, bytes a weight
_PREAMBLE = struct.Struct("<8sIIQ")  # magic, version, header bytes (unpadded JSON), xxh64 of the JSON


def align_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def padded_cols(cols: int) -> int:
    """Columns a quantized row stores: `cols` rounded up to whole groups; the extra codes multiply zeros."""
    return align_up(cols, GROUP)


@dataclass(frozen=True)
class MatrixSpec:
    """Name (the experts module's parameter name) and logical shape of one matrix of a record."""

    name: str
    rows: int
    cols: int

    @property
    def weights(self) -> int:
        return self.rows * self.cols


@dataclass(frozen=True)
class Section:
    """Byte offsets of one matrix within a record. `low` is None unless the codec is int4; raw codecs use `high` only.

    high: int4: 2-bit plane [rows, padded/4]; int8: codes [rows, padded]; raw: values [rows, cols]. Codes and planes
        are in the order that `packing.py` gives.
    affine: float16 [rows, 2, groups]: the scales `a` of a row, then its offsets `b`.
    low: int4: 2-bit plane [rows, padded/4].
    """

    high: int
    affine: int
    low: int | None


@dataclass(frozen=True)
class RecordLayout:
    """Where each matrix of one record lies. `page_aligned=False` is the packed dense form."""

    codec: str
    matrices: tuple[MatrixSpec, ...]
    page_aligned: bool = True

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise StoreError(f"unknown codec {self.codec!r}: this version reads {', '.join(CODECS)}")
        if len(self.matrices) * 8 > CONSTANTS_BYTES:
            raise StoreError(f"a record holds at most {CONSTANTS_BYTES // 8} matrices, not {len(self.matrices)}")

    @property
    def is_raw(self) -> bool:
        return self.codec in RAW_CODECS

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return (Precision.INT2, Precision.FULL) if self.codec == "int4" else (Precision.FULL,)

    def depth(self, wanted: Precision) -> Precision:
        """What a slot holds once `wanted` was read into it: FULL where the codec has no INT2 version."""
        return wanted if wanted in self.precisions else Precision.FULL

    @cached_property
    def _placed(self) -> tuple[tuple[Section, ...], int, int]:
        """(sections, end of the INT2 prefix, end of the record), bytes, unpadded."""
        if self.is_raw:
            offsets, at = [], 0
            for m in self.matrices:
                offsets.append(Section(at, at, None))
                at = align_up(at + m.weights * RAW_CODECS[self.codec][1], ALIGN)
            return tuple(offsets), at, at
        high_bytes = [m.rows * padded_cols(m.cols) // (4 if self.codec == "int4" else 1) for m in self.matrices]
        affine_bytes = [m.rows * (padded_cols(m.cols) // GROUP) * 4 for m in self.matrices]
        at = CONSTANTS_BYTES
        high, at = _run(at, high_bytes)
        affine, prefix_end = _run(at, affine_bytes)
        if self.codec == "int8":
            return tuple(map(Section, high, affine, [None] * len(high))), prefix_end, prefix_end
        low, end = _run(prefix_end, high_bytes)
        return tuple(map(Section, high, affine, low)), prefix_end, end

    @property
    def sections(self) -> tuple[Section, ...]:
        return self._placed[0]

    @property
    def payload_bytes(self) -> int:
        """Bytes that carry information, before padding."""
        return self._placed[2]

    @property
    def record_bytes(self) -> int:
        return align_up(self._placed[2], PAGE_BYTES if self.page_aligned else ALIGN)

    def span(self, held: Precision | None, wanted: Precision) -> tuple[int, int]:
        """(offset, length) in bytes to read so that a slot holding `held` (None: nothing) holds `wanted`.

        Page aligned at both ends: an upgrade reads again the page the two halves share.
        """
        prefix_end = self._placed[1]
        end = self.record_bytes
        if wanted is Precision.INT2 and self.codec == "int4":
            end = min(end, align_up(prefix_end, PAGE_BYTES))
        start = 0 if held is None else prefix_end // PAGE_BYTES * PAGE_BYTES
        return start, end - start

    @property
    def split(self) -> int:
        """Offset that divides the record for its two checksums: the end of the INT2 prefix."""
        return self._placed[1]

    @property
    def weights(self) -> int:
        return sum(m.weights for m in self.matrices)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, affine included, constants block and page padding not."""
        raw = self.payload_bytes - (0 if self.is_raw else CONSTANTS_BYTES)
        return round(8 * raw / self.weights, 4)


def _run(at: int, sizes: list[int]) -> tuple[list[int], int]:
    """Offsets of consecutive ALIGN-ed pieces starting at `at`, and the end."""
    offsets = []
    for size in sizes:
        offsets.append(at)
        at = align_up(at + size, ALIGN)
    return offsets, at


@dataclass(frozen=True)
class LayerSpec:
    """One MoE layer of a store: the experts module's dotted name, its expert count and matrices. codec: None: the
    header's."""

    module: str
    num_experts: int
    matrices: tuple[MatrixSpec, ...]
    codec: str | None = None


@dataclass(frozen=True)
class StoreHeader:
    """What `experts.fate` says of itself. `codec`: of the layers that name none. `fingerprint` identifies the source
    checkpoint and conversion options."""

    codec: str
    fingerprint: str
    model_type: str
    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        """A layer that names the header's own codec names none, so that equal stores have equal headers."""
        layers = tuple(replace(layer, codec=None) if layer.codec == self.codec else layer for layer in self.layers)
        object.__setattr__(self, "layers", layers)

    @property
    def version(self) -> int:
        return FORMAT_VERSION if all(layer.codec is None for layer in self.layers) else MIXED_VERSION

    @cached_property
    def codecs(self) -> tuple[str, ...]:
        """Of each layer."""
        return tuple(layer.codec or self.codec for layer in self.layers)

    @property
    def is_raw(self) -> bool:
        """Whether no layer is quantized."""
        return all(codec in RAW_CODECS for codec in self.codecs)

    def layout(self, layer: int) -> RecordLayout:
        return self._layouts[layer]

    @cached_property
    def _layouts(self) -> tuple[RecordLayout, ...]:
        return tuple(RecordLayout(codec, layer.matrices) for codec, layer in zip(self.codecs, self.layers))

    @property
    def num_records(self) -> int:
        return sum(layer.num_experts for layer in self.layers)

    @cached_property
    def _first_record(self) -> tuple[int, ...]:
        """Index of each layer's expert 0 among all records."""
        firsts, total = [], 0
        for layer in self.layers:
            firsts.append(total)
            total += layer.num_experts
        return tuple(firsts)

    def record_index(self, layer: int, expert: int) -> int:
        return self._first_record[layer] + expert

    @cached_property
    def _json(self) -> bytes:
        fields = asdict(self)
        for layer in fields["layers"]:
            if layer["codec"] is None:
                del layer["codec"]
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    @property
    def checksums_offset(self) -> int:
        return align_up(_PREAMBLE.size + len(self._json), PAGE_BYTES)

    @cached_property
    def _layer_offsets(self) -> tuple[int, ...]:
        at = align_up(self.checksums_offset + self.num_records * CHECKSUM_BYTES, PAGE_BYTES)
        offsets = [at]
        for index, layer in enumerate(self.layers):
            at += layer.num_experts * self.layout(index).record_bytes
            offsets.append(at)
        return tuple(offsets)

    def record_offset(self, layer: int, expert: int) -> int:
        return self._layer_offsets[layer] + expert * self.layout(layer).record_bytes

    @property
    def file_bytes(self) -> int:
        return self._layer_offsets[-1]

    @property
    def max_record_bytes(self) -> int:
        return max(layout.record_bytes for layout in self._layouts)

    def encode(self, checksum: int) -> bytes:
        """Preamble and JSON, padded to a page. `checksum` is the xxh64 of `json_bytes`."""
        head = _PREAMBLE.pack(MAGIC, self.version, len(self._json), checksum) + self._json
        return head.ljust(self.checksums_offset, b"\0")

    @property
    def json_bytes(self) -> bytes:
        return self._json


def decode_preamble(head: bytes, path: object) -> tuple[int, int]:
    """(JSON length, xxh64 of the JSON) from the first bytes of a file; raises StoreError or StoreVersionError."""
    if len(head) < _PREAMBLE.size or head[:8] != MAGIC:
        raise StoreError(f"{path} is not a Fate store: convert the checkpoint again with fate convert")
    _, version, length, checksum = _PREAMBLE.unpack_from(head)
    if version not in (FORMAT_VERSION, MIXED_VERSION):
        raise StoreVersionError(
            f"{path} has store format version {version}, this fate reads versions {FORMAT_VERSION} and "
            f"{MIXED_VERSION}: convert the checkpoint again with fate convert, or run fate synth again"
        )
    return length, checksum


PREAMBLE_BYTES = _PREAMBLE.size


def decode_header(blob: bytes) -> StoreHeader:
    """Inverse of `json_bytes`."""
    raw = json.loads(blob)
    layers = tuple(
        LayerSpec(
            layer["module"], layer["num_experts"], tuple(MatrixSpec(**m) for m in layer["matrices"]), layer.get("codec")
        )
        for layer in raw["layers"]
    )
    return StoreHeader(raw["codec"], raw["fingerprint"], raw["model_type"], layers)
