"""Codes to bytes and back, in torch: the meaning of the packed rows that the kernels read.

A row is cut into chunks of 1024 columns, 16 groups of 64, then at most one of 512, 256, 128 and 64 (columns are padded
to a multiple of 64), so no shape wastes a byte. In a chunk of n groups the codes are ordered by fours: columns 0-3 of
each group in turn, then columns 4-7 of each, and so on. 32-bit lane j of every 64 bytes of codes therefore belongs to
group j % n, and an instruction that adds up products of four bytes sums each group in a lane of its own.

In a 2-bit plane, 256 codes in that order take 64 bytes (at a row's end 128 take 32, or 64 take 16): of C codes, byte j
holds number j, C/4 + j, 2C/4 + j, 3C/4 + j in bits 0-1, 2-3, 4-5, 6-7. One shift and mask of 64 bytes yields 64 codes.

>>> codes = torch.arange(192, dtype=torch.uint8).remainder(4).reshape(1, 192)
>>> torch.equal(unpack_plane(pack_plane(codes), 192), codes)
True
>>> order(torch.arange(128).reshape(1, 128))[0, :12].tolist()
[0, 1, 2, 3, 64, 65, 66, 67, 4, 5, 6, 7]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fate.store.format import GROUP

_CHUNKS = (1024, 512, 256, 128, 64)
_RUNS = (256, 128, 64)


def order(codes: torch.Tensor) -> torch.Tensor:
    """Codes [rows, cols] in the order of the columns -> in that of a packed row."""
    return _reorder(codes, lambda groups: (groups, GROUP // 4))


def restore(ordered: torch.Tensor) -> torch.Tensor:
    """Inverse of `order`."""
    return _reorder(ordered, lambda groups: (GROUP // 4, groups))


def pack_plane(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes in 0..3, [rows, cols] in the order of the columns -> bytes [rows, cols / 4]."""
    rows, cols = codes.shape
    ordered, out = order(codes), torch.empty(rows, cols // 4, dtype=torch.uint8)
    for first, size, count in _cut(cols, _RUNS):
        span = size * count
        quarters = ordered[:, first : first + span].reshape(rows, count, 4, size // 4)
        packed = quarters[:, :, 0] | quarters[:, :, 1] << 2 | quarters[:, :, 2] << 4 | quarters[:, :, 3] << 6
        out[:, first // 4 : (first + span) // 4] = packed.reshape(rows, span // 4)
    return out


def unpack_plane(packed: torch.Tensor, cols: int) -> torch.Tensor:
    """Inverse of `pack_plane`: bytes [rows, cols / 4] -> uint8 codes [rows, cols]."""
    rows = packed.shape[0]
    ordered = torch.empty(rows, cols, dtype=torch.uint8)
    for first, size, count in _cut(cols, _RUNS):
        span = size * count
        piece = packed[:, first // 4 : (first + span) // 4].reshape(rows, count, size // 4)
        quarters = torch.stack([piece >> shift & 3 for shift in (0, 2, 4, 6)], dim=2)
        ordered[:, first : first + span] = quarters.reshape(rows, span)
    return restore(ordered)


def _reorder(codes: torch.Tensor, shape: Callable[[int], tuple[int, int]]) -> torch.Tensor:
    """Every chunk's fours, seen as `shape(its groups)`, transposed."""
    rows, cols = codes.shape
    out = torch.empty_like(codes, memory_format=torch.contiguous_format)
    for first, size, count in _cut(cols, _CHUNKS):
        piece = slice(first, first + size * count)
        fours = codes[:, piece].reshape(rows, count, *shape(size // GROUP), 4)
        out[:, piece] = fours.transpose(2, 3).reshape(rows, size * count)
    return out


def _cut(cols: int, sizes: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(first column, size, how many) of the pieces of a row: as many of the first size as fit, then of the next."""
    at = 0
    for size in sizes:
        count = (cols - at) // size
        if count:
            yield at, size, count
            at += size * count
