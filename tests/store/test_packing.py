from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fate.store.packing import order, pack_plane, restore, unpack_plane

ALL_COLS = [64, 128, 192, 256, 320, 704, 768, 1408, 2048, 2880, 3008]


def chunks(cols: int) -> Iterator[tuple[int, int]]:
    """(first column, columns) of each chunk of a row, as the specification has them."""
    first = 0
    while first < cols:
        size = next(size for size in (1024, 512, 256, 128, 64) if size <= cols - first)
        yield first, size
        first += size


def test_round_trip() -> None:
    for cols in ALL_COLS:
        codes = torch.randint(0, 4, (5, cols), dtype=torch.uint8)
        packed = pack_plane(codes)
        assert packed.shape == (5, cols // 4)
        assert torch.equal(unpack_plane(packed, cols), codes), cols


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


def test_restore_is_the_inverse_of_order() -> None:
    for cols in ALL_COLS:
        codes = torch.arange(2 * cols).view(2, cols)
        ordered = order(codes)
        assert torch.equal(restore(ordered), codes), cols
        assert torch.equal(ordered.sort(dim=1).values, codes), cols
