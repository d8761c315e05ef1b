"""The byte layout: golden bytes of a header, sizes of known shapes, and what is read for each precision."""

from dataclasses import replace

import pytest
import xxhash

from fate.core import Precision
from fate.errors import StoreError, StoreVersionError
from fate.store.format import (
    PAGE_BYTES,
    LayerSpec,
    MatrixSpec,
    RecordLayout,
    StoreHeader,
    decode_header,
    decode_preamble,
)

SMALL = StoreHeader(
    "int4",
    "f00d",
    "qwen2_moe",
    (LayerSpec("model.layers.0.mlp.experts", 2, (MatrixSpec("gate_up_proj", 8, 64), MatrixSpec("down_proj", 64, 4))),),
)
GOLDEN_JSON = (
    b'{"codec":"int4","fingerprint":"f00d","layers":[{"matrices":[{"cols":64,"name":"gate_up_proj","rows":8},'
    b'{"cols":4,"name":"down_proj","rows":64}],"module":"model.layers.0.mlp.experts","num_experts":2}],'
    b'"model_type":"qwen2_moe"}'
)
GOLDEN_PREAMBLE = b"FATESTOR" + bytes.fromhex("02000000e1000000")


def swiglu(hidden, intermediate):
    return (MatrixSpec("gate_up_proj", 2 * intermediate, hidden), MatrixSpec("down_proj", hidden, intermediate))


def test_golden_header_bytes():
    encoded = SMALL.encode(xxhash.xxh64_intdigest(SMALL.json_bytes))
    assert SMALL.json_bytes == GOLDEN_JSON
    assert encoded[:16] == GOLDEN_PREAMBLE
    assert encoded[16:24] == xxhash.xxh64_intdigest(GOLDEN_JSON).to_bytes(8, "little")
    assert encoded[24 : 24 + len(GOLDEN_JSON)] == GOLDEN_JSON
    assert encoded[24 + len(GOLDEN_JSON) :] == bytes(PAGE_BYTES - 24 - len(GOLDEN_JSON))


def test_golden_offsets():
    layout = SMALL.layout(0)
    assert [(s.high, s.affine, s.low) for s in layout.sections] == [(64, 1216, 1536), (192, 1280, 1664)]
    assert (layout.split, layout.payload_bytes, layout.record_bytes) == (1536, 2688, 4096)
    assert (SMALL.checksums_offset, SMALL.record_offset(0, 0), SMALL.record_offset(0, 1)) == (4096, 8192, 12288)
    assert SMALL.file_bytes == 16384


def test_the_header_reads_back():
    encoded = SMALL.encode(7)
    length, checksum = decode_preamble(encoded, "x")
    assert checksum == 7
    assert decode_header(encoded[24 : 24 + length]) == SMALL


MIXED = StoreHeader("int4", "f00d", "qwen2_moe", (SMALL.layers[0], replace(SMALL.layers[0], codec="bf16")))


def test_layers_of_several_codecs_are_another_version():
    assert (SMALL.version, MIXED.version) == (2, 3)
    assert MIXED.encode(0)[8:12] == (3).to_bytes(4, "little")
    assert MIXED.json_bytes.count(b'"codec":') == 2
    assert b'{"codec":"bf16","matrices":' in MIXED.json_bytes
    assert decode_preamble(MIXED.encode(7), "x") == (len(MIXED.json_bytes), 7)
    assert decode_header(MIXED.json_bytes) == MIXED
    assert MIXED.codecs == ("int4", "bf16")
    assert not MIXED.is_raw
    assert MIXED.record_offset(1, 0) - MIXED.record_offset(0, 0) == 2 * MIXED.layout(0).record_bytes
    assert MIXED.layout(1) == RecordLayout("bf16", SMALL.layers[0].matrices)


def test_a_layer_that_names_the_files_codec_changes_nothing():
    named = replace(SMALL, layers=(replace(SMALL.layers[0], codec="int4"),))
    assert named == SMALL
    assert named.encode(7) == SMALL.encode(7)


def test_a_codec_that_is_none_is_refused():
    blob = MIXED.json_bytes.replace(b"bf16", b"int3")
    with pytest.raises(StoreError, match="unknown codec 'int3'"):
        decode_header(blob).layout(1)


def test_what_is_read_to_int2_where_there_is_none_is_whole():
    assert [MIXED.layout(layer).depth(Precision.INT2) for layer in (0, 1)] == [Precision.INT2, Precision.FULL]


@pytest.mark.parametrize(
    ("head", "error"),
    [
        (b"", StoreError),
        (b"FATESTOR", StoreError),
        (b"x" * 24, StoreError),
        (b"FATESTOR\x01" + bytes(20), StoreVersionError),
    ],
)
def test_foreign_preambles(head, error):
    with pytest.raises(error, match="convert the checkpoint again"):
        decode_preamble(head, "experts.fate")


@pytest.mark.parametrize(
    ("model", "hidden", "intermediate", "int2_bits", "int4_bits"),
    [
        ("Qwen1.5-MoE, DeepSeekMoE", 2048, 1408, 2.5, 4.5),
        ("Qwen3-30B-A3B", 2048, 768, 2.5, 4.5),
        ("Mixtral 8x7B", 4096, 14336, 2.5, 4.5),
        ("OLMoE", 2048, 1024, 2.5, 4.5),
        ("DeepSeek-V3", 7168, 2048, 2.5, 4.5),
        ("gpt-oss", 2880, 2880, 2.5, 4.5),
        ("Gemma-4-26B-A4B", 2816, 704, 2.5, 4.5),
        ("embedded model", 192, 64, 2.5, 4.5),
    ],
)
def test_bits_per_weight_of_known_shapes(model, hidden, intermediate, int2_bits, int4_bits):
    layout = RecordLayout("int4", swiglu(hidden, intermediate))
    assert layout.bits_per_weight == int4_bits
    assert 8 * (layout.split - 64) / layout.weights == pytest.approx(int2_bits, abs=1e-3)
    padding = layout.record_bytes - layout.payload_bytes
    assert 0 <= padding < PAGE_BYTES


def test_an_upgrade_reads_only_the_second_half():
    layout = RecordLayout("int4", swiglu(2048, 1408))
    start, prefix = layout.span(None, Precision.INT2)
    at, rest = layout.span(Precision.INT2, Precision.FULL)
    whole = layout.span(None, Precision.FULL)
    assert (start, whole) == (0, (0, layout.record_bytes))
    assert at <= prefix
    assert at + rest == layout.record_bytes
    assert prefix + rest - layout.record_bytes in (0, PAGE_BYTES), "at most the shared page is read twice"
    assert prefix / layout.record_bytes == pytest.approx(2.5 / 4.5, abs=0.01)
    assert all(value % PAGE_BYTES == 0 for value in (prefix, at, rest, whole[1]))


@pytest.mark.parametrize(("codec", "bits"), [("bf16", 16), ("fp16", 16), ("fp32", 32), ("int8", 8.5)])
def test_other_codecs(codec, bits):
    layout = RecordLayout(codec, swiglu(2048, 1408))
    assert layout.bits_per_weight == bits
    assert layout.span(None, Precision.INT2) == layout.span(None, Precision.FULL)


def test_an_unknown_codec():
    with pytest.raises(StoreError, match="unknown codec 'int3': this version reads int4, int8"):
        RecordLayout("int3", swiglu(64, 64))
