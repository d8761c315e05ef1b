from __future__ import annotations

import pytest
import torch

from fate.quant.packing import chunks, pack_plane, unpack_plane

ALL_COLS = [64, 128, 192, 256, 320, 704, 768, 1408, 2048, 2880]


@pytest.mark.parametrize("cols", ALL_COLS)
def test_round_trip(cols: int) -> None:
    codes = torch.randint(0, 4, (5, cols), dtype=torch.uint8)
    packed = pack_plane(codes)
    assert packed.shape == (5, cols // 4)
    assert torch.equal(unpack_plane(packed, cols), codes)


@pytest.mark.parametrize("cols", ALL_COLS)
def test_each_column_lands_where_the_specification_says(cols: int) -> None:
    for first, size in chunks(cols):
        for column in range(first, first + size):
            codes = torch.zeros(1, cols, dtype=torch.uint8)
            codes[0, column] = 3
            part, byte = divmod(column - first, size // 4)
            expected = torch.zeros(1, cols // 4, dtype=torch.uint8)
            expected[0, first // 4 + byte] = 3 << 2 * part
            assert torch.equal(pack_plane(codes), expected)


def test_chunks_of_each_tail() -> None:
    assert list(chunks(704)) == [(0, 256), (256, 256), (512, 128), (640, 64)]
    assert list(chunks(64)) == [(0, 64)]
    assert list(chunks(384)) == [(0, 256), (256, 128)]
