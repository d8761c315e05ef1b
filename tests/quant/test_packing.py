from __future__ import annotations

import pytest
import torch

from fate.quant.packing import chunks, order, pack_plane, restore, unpack_plane

ALL_COLS = [64, 128, 192, 256, 320, 704, 768, 1408, 2048, 2880, 3008]


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
            group, place = divmod(column - first, 64)
            number = (place // 4 * (size // 64) + group) * 4 + place % 4  # of the chunk's codes
            assert order(codes)[0, first + number] == 3
            run, within = divmod(number, min(size, 256))
            part, byte = divmod(within, min(size, 256) // 4)
            expected = torch.zeros(1, cols // 4, dtype=torch.uint8)
            expected[0, first // 4 + 64 * run + byte] = 3 << 2 * part
            assert torch.equal(pack_plane(codes), expected)


@pytest.mark.parametrize("cols", ALL_COLS)
def test_restore_is_the_inverse_of_order(cols: int) -> None:
    codes = torch.arange(2 * cols).view(2, cols)
    ordered = order(codes)
    assert torch.equal(restore(ordered), codes)
    assert torch.equal(ordered.sort(dim=1).values, codes)


def test_chunks_of_each_tail() -> None:
    assert list(chunks(704)) == [(0, 512), (512, 128), (640, 64)]
    assert list(chunks(64)) == [(0, 64)]
    assert list(chunks(384)) == [(0, 256), (256, 128)]
    assert list(chunks(3008)) == [(0, 1024), (1024, 1024), (2048, 512), (2560, 256), (2816, 128), (2944, 64)]
