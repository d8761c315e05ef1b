from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from fate.convert.encode import encode_record, quantize_matrix
from fate.core import Precision
from fate.kernels import native
from fate.kernels.reference import dequantize
from fate.store.format import MatrixSpec, RecordLayout
from fate.store.packing import unpack_plane
from packed_records import expert_layout, matrix_layout, relative_error

SHAPES = [(1, 64), (5, 100), (64, 192), (33, 1408), (300, 704), (2, 36)]


def weights_of(rows: int, cols: int, scale: float = 0.02) -> Tensor:
    return scale * torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows + cols))


@pytest.mark.parametrize(
    "codec, precision, tolerance",
    [("int4", Precision.FULL, 0.11), ("int4", Precision.INT2, 0.45), ("int8", Precision.FULL, 0.007)],
)
def test_round_trip(quantizer: str, codec: str, precision: Precision, tolerance: float) -> None:
    for rows, cols in SHAPES:
        weights = weights_of(rows, cols)
        record = quantize_matrix(weights, codec)
        layout = matrix_layout(codec, rows, cols)
        assert record.shape == (layout.record_bytes,)
        assert relative_error(dequantize(record, layout, 0, precision), weights) < tolerance, f"{rows} x {cols}"


@pytest.mark.parametrize("codec", ["int4", "int8"])
def test_compiled_and_torch_agree(codec: str) -> None:
    """Sums are taken in another order, so a code at the very middle of two levels may fall either way."""
    if native.available() == ("torch",):
        pytest.skip("the compiled extension is missing")
    for rows, cols in SHAPES:
        weights = weights_of(rows, cols)
        compiled = quantize_matrix(weights, codec)
        with native.selected("torch"):
            plain = quantize_matrix(weights, codec)
        assert (compiled != plain).sum() <= 8 + 0.001 * len(plain), f"{rows} x {cols}"
        layout = matrix_layout(codec, rows, cols)
        errors = [relative_error(dequantize(record, layout, 0), weights) for record in (compiled, plain)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3), f"{rows} x {cols}"


def test_any_float_weights(quantizer: str) -> None:
    weights = weights_of(20, 192).bfloat16()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(quantize_matrix(weights.to(dtype), "int4"), quantize_matrix(weights.float(), "int4")), dtype


def test_weights_that_are_a_view(quantizer: str) -> None:
    whole = weights_of(64, 200)
    for view in (whole[3:9], whole[:, 7:107], whole.T):
        assert torch.equal(quantize_matrix(view, "int4"), quantize_matrix(view.contiguous(), "int4"))


def test_rows_do_not_depend_on_each_other_or_on_threads(quantizer: str) -> None:
    """Within one scale: the gain is the only thing rows share."""
    weights = weights_of(1100, 128)
    weights[:, 0] = 0.5
    torch.set_num_threads(2)
    whole = dequantize(quantize_matrix(weights, "int4"), matrix_layout("int4", 1100, 128), 0)
    torch.set_num_threads(1)
    part = dequantize(quantize_matrix(weights[1090:], "int4"), matrix_layout("int4", 10, 128), 0)
    assert torch.equal(whole[1090:], part)


@pytest.mark.parametrize("codec", ["int4", "int8"])
def test_magnitudes_float16_could_not_hold(quantizer: str, codec: str) -> None:
    weights = weights_of(8, 192, 1.0)
    for scale in (1e-30, 1e-8, 1.0, 1e4, 1e30):
        values = dequantize(quantize_matrix(weights * scale, codec), matrix_layout(codec, 8, 192), 0)
        assert values.isfinite().all(), scale
        assert relative_error(values.double() / scale, weights) < (0.11 if codec == "int4" else 0.007), scale


@pytest.mark.parametrize("codec", ["int4", "int8"])
def test_groups_of_very_different_sizes(quantizer: str, codec: str) -> None:
    """A group a millionth of the largest keeps its own precision."""
    weights = weights_of(4, 256, 1.0)
    weights[1] *= 1e-6
    weights[2, 64:128] *= 1e-5
    values = dequantize(quantize_matrix(weights, codec), matrix_layout(codec, 4, 256), 0)
    tolerance = 0.11 if codec == "int4" else 0.007
    for piece in ((1, slice(None)), (2, slice(64, 128)), (0, slice(None))):
        assert relative_error(values[piece], weights[piece]) < tolerance


@pytest.mark.parametrize("codec", ["int4", "int8"])
def test_zeros_and_constants(quantizer: str, codec: str) -> None:
    layout = matrix_layout(codec, 3, 100)
    zeros = quantize_matrix(torch.zeros(3, 100), codec)
    assert torch.equal(dequantize(zeros, layout, 0), torch.zeros(3, 100))
    assert zeros[:8].view(torch.float32)[1] == 1.0
    constant = torch.full((3, 100), -0.375)
    assert torch.equal(dequantize(quantize_matrix(constant, codec), layout, 0), constant)


def test_int2_is_unbiased(quantizer: str) -> None:
    weights = weights_of(64, 704)
    coarse = dequantize(
        quantize_matrix(weights, "int4"), matrix_layout("int4", 64, 704), 0, Precision.INT2, torch.float64
    )
    assert float((weights * coarse).sum() / weights.double().square().sum()) == pytest.approx(1.0, abs=1e-5)


def test_codes_are_nearest_under_the_stored_scales(quantizer: str) -> None:
    weights = weights_of(40, 192)
    layout = matrix_layout("int4", 40, 192)
    record, section = quantize_matrix(weights, "int4"), layout.sections[0]
    gain = record[:4].view(torch.float32).double()
    affine = record[section.affine : section.affine + 40 * 12].view(torch.float16).view(40, 2, 3, 1).double()
    scales, offsets = affine.unbind(1)
    best = ((weights.double().view(40, 3, 64) / gain - offsets) / scales).round().clamp(0, 15).view(40, 192)
    high = unpack_plane(record[section.high : section.high + 40 * 48].view(40, 48), 192)
    low = unpack_plane(record[section.low : section.low + 40 * 48].view(40, 48), 192)
    assert ((4 * high + low) != best).float().mean() < 1e-3


def test_padding_columns_and_bytes_are_zero(quantizer: str) -> None:
    layout = matrix_layout("int4", 3, 100)
    record, section = quantize_matrix(weights_of(3, 100), "int4"), layout.sections[0]
    for plane in (section.high, section.low):
        assert not unpack_plane(record[plane : plane + 96].view(3, 32), 128)[:, 100:].any()
    assert not record[8:64].any()
    assert not record[section.affine + 24 : section.low].any()


@pytest.mark.parametrize("codec", ["bf16", "fp16", "fp32"])
def test_raw_records_hold_the_weights(quantizer: str, codec: str) -> None:
    layout = expert_layout(codec, 36, 10)
    matrices = {"gate_up_proj": weights_of(20, 36), "down_proj": weights_of(36, 10)}
    record = encode_record(matrices, layout)
    assert record.shape == (layout.record_bytes,)
    for index, spec in enumerate(layout.matrices):
        values = dequantize(record, layout, index)
        assert relative_error(values, matrices[spec.name]) < 0.005
        if codec == "fp32":
            assert torch.equal(values, matrices[spec.name])


def test_an_expert_is_its_matrices_side_by_side(quantizer: str) -> None:
    layout = expert_layout("int4", 192, 100)
    matrices = {"down_proj": weights_of(192, 100), "gate_up_proj": weights_of(200, 192, 3.0)}
    record = encode_record(matrices, layout)
    for index, spec in enumerate(layout.matrices):
        alone = quantize_matrix(matrices[spec.name], "int4")
        for precision in layout.precisions:
            expected = dequantize(alone, matrix_layout("int4", spec.rows, spec.cols), 0, precision)
            assert torch.equal(dequantize(record, layout, index, precision), expected)


def test_wrong_matrices_are_refused(quantizer: str) -> None:
    layout = RecordLayout("int4", (MatrixSpec("up", 4, 64),))
    with pytest.raises(ValueError, match=r"up has shape None: the layout needs \[4, 64\]"):
        encode_record({}, layout)
    with pytest.raises(ValueError, match=r"shape \(64, 4\)"):
        encode_record({"up": torch.zeros(64, 4)}, layout)
    for bad in (float("nan"), float("inf")):
        weights = weights_of(4, 64)
        weights[2, 5] = bad
        with pytest.raises(ValueError, match="infinite or NaN"):
            encode_record({"up": weights}, layout)


def golden_matrix(rows: int, cols: int) -> Tensor:
    """Weights on an exact grid, so that every implementation rounds them alike."""
    index = torch.arange(rows * cols).view(rows, cols)
    return (index * 7 % 16 - 8).float() / 8 + (index // 64 % 3).float() / 4


@pytest.mark.parametrize(
    "codec, digest", [("int4", "eb32d08d7156979d"), ("int8", "007f121f3c96c26f"), ("bf16", "65c1b186ba144794")]
)
def test_golden_bytes(quantizer: str, codec: str, digest: str) -> None:
    """A change here changes the store format: bump FORMAT_VERSION."""
    layout = RecordLayout(codec, (MatrixSpec("a", 2, 64), MatrixSpec("b", 3, 1930)))
    record = encode_record({"a": golden_matrix(2, 64), "b": golden_matrix(3, 1930)}, layout)
    assert hashlib.sha256(record.numpy().tobytes()).hexdigest()[:16] == digest
    if codec == "int4":
        assert bytes(record[:16].tolist()).hex() == "000080398887873f000080392334833f"
        assert bytes(record[64:80].tolist()).hex() == "0055ff55ff00aa00aaff55ff55aa00aa"
        b = layout.sections[1].high  # 31 groups
        assert bytes(record[b : b + 16].tolist()).hex() == "6cb11bb16cb11bb16cb11bb16cb11bb1"
