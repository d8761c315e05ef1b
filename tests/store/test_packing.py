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
    ordered = torch.zeros(cols, cols, dtype=torch.uint8)  # row c: of codes that are 0 but in column c
    packed = torch.zeros(cols, cols // 4, dtype=torch.uint8)
    for first, size in chunks(cols):
        for column in range(first, first + size):
            group, place = divmod(column - first, 64)
            number = (place // 4 * (size // 64) + group) * 4 + place % 4  # of the chunk's codes
            ordered[column, first + number] = 3
            run, within = divmod(number, min(size, 256))
            part, byte = divmod(within, min(size, 256) // 4)
            packed[column, first // 4 + 64 * run + byte] = 3 << 2 * part
    codes = 3 * torch.eye(cols, dtype=torch.uint8)
    assert torch.equal(order(codes), ordered)
    assert torch.equal(pack_plane(codes), packed)


def test_restore_is_the_inverse_of_order() -> None:
    for cols in ALL_COLS:
        codes = torch.arange(2 * cols).view(2, cols)
        ordered = order(codes)
        assert torch.equal(restore(ordered), codes), cols
        assert torch.equal(ordered.sort(dim=1).values, codes), cols
