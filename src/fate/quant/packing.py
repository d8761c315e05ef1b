"""Codes to bytes and back, in torch: the meaning of the planes that the kernels read.

A row of codes is cut into chunks of 256 columns, then at most one of 128 and one of 64 (columns are padded to a
multiple of 64), so no shape wastes a byte. A chunk of C columns takes C/4 bytes: byte j holds the codes of columns
j, C/4 + j, 2C/4 + j, 3C/4 + j in bits 0-1, 2-3, 4-5, 6-7. One shift and mask of a 64-byte register therefore yields
64 neighbouring columns, which is one quantization group.

>>> codes = torch.arange(192, dtype=torch.uint8).remainder(4).reshape(1, 192)
>>> torch.equal(unpack_plane(pack_plane(codes), 192), codes)
True
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_CHUNKS = (256, 128, 64)


def chunks(cols: int) -> Iterator[tuple[int, int]]:
    """(first column, columns) of each packed chunk of a row of `cols` columns, a multiple of 64."""
    at = 0
    for size in _CHUNKS:
        while cols - at >= size:
            yield at, size
            at += size


def pack_plane(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes in 0..3, [rows, cols] -> bytes [rows, cols / 4]."""
    rows, cols = codes.shape
    out = torch.empty(rows, cols // 4, dtype=torch.uint8)
    for first, size, count in _runs(cols):
        span = size * count
        quarters = codes[:, first : first + span].reshape(rows, count, 4, size // 4)
        packed = quarters[:, :, 0] | quarters[:, :, 1] << 2 | quarters[:, :, 2] << 4 | quarters[:, :, 3] << 6
        out[:, first // 4 : (first + span) // 4] = packed.reshape(rows, span // 4)
    return out


def unpack_plane(packed: torch.Tensor, cols: int) -> torch.Tensor:
    """Inverse of `pack_plane`: bytes [rows, cols / 4] -> uint8 codes [rows, cols]."""
    rows = packed.shape[0]
    out = torch.empty(rows, cols, dtype=torch.uint8)
    for first, size, count in _runs(cols):
        span = size * count
        piece = packed[:, first // 4 : (first + span) // 4].reshape(rows, count, size // 4)
        quarters = torch.stack([piece >> shift & 3 for shift in (0, 2, 4, 6)], dim=2)
        out[:, first : first + span] = quarters.reshape(rows, span)
    return out


def _runs(cols: int) -> Iterator[tuple[int, int, int]]:
    """(first column, chunk size, number of such chunks): `chunks` with equal sizes joined."""
    at = 0
    for size in _CHUNKS:
        count = (cols - at) // size
        if count:
            yield at, size, count
            at += size * count
