// One packed matrix as the kernels see it. store/format.py and quant/packing.py are the specification.
//
// A matrix [rows, cols] is stored in groups of 64 columns; `groups` = ceil(cols / 64). Per row:
//
//   codes (int8)        groups * 64 bytes, one code per byte
//   high, low (int4)    groups * 16 bytes each: 2-bit planes of the code q = 4h + l
//   affine              float16 [2, groups]: scales a, then offsets b; a weight is gain * (a * q + b)
//
// A row is cut into chunks of 16 groups, then at most one of 8, 4, 2 and 1 (the tail). In a chunk of n groups the
// codes take turns by fours: the first four columns of each group, then the next four of each, and so on. So dword j of
// every 64 bytes of codes is of group j % n, and what 32-bit lanes sum of their products are sums of groups, not of
// parts.
// Codes of int8 lie there in this order. A plane has 64 bytes for every 256 of them, or 32 or 16 for the 128 or 64 of
// a chunk of 2 or 1: a run. Byte j of a run of B bytes holds four codes, bits 2k..2k+1 being code k * B + j of the
// run, so one shift and mask yields 64 codes.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fate {

constexpr int kGroup = 64;            // columns that share one scale and one offset
constexpr int kPlaneGroupBytes = 16;  // bytes of one group in a 2-bit plane
constexpr int kLanes = 16;            // partial sums of one output: group g is added to lane g % kLanes
constexpr int kTileRows = 64;         // most weight rows a tile kernel handles at once; the tile's row pitch
constexpr int kTileTokens = 128;      // most tokens a tile kernel handles at once
constexpr int kChunkGroups = kLanes;  // of every chunk of a row but those of its tail

enum class Mode { kInt4, kInt2, kInt8 };

// Groups of the chunk that starts at group `first` of a row.
constexpr int chunk_groups(int groups, int first) {
    const int left = groups - first;
    return left >= kChunkGroups ? kChunkGroups : static_cast<int>(std::bit_floor(static_cast<unsigned>(left)));
}

// Groups of the chunk that group `group` of a row is in.
constexpr int chunk_of(int groups, int group) {
    int first = group / kChunkGroups * kChunkGroups, n = chunk_groups(groups, first);
    while (group >= first + n) {
        first += n;
        n = chunk_groups(groups, first);
    }
    return n;
}

// Calls body(first, std::integral_constant<int, n>) for every chunk of a row: its first group, and how many it has.
template <typename Body>
inline __attribute__((always_inline)) void for_chunks(int groups, const Body& body) {
    int first = 0;
    for (; groups - first >= kChunkGroups; first += kChunkGroups) {
        body(first, std::integral_constant<int, kChunkGroups>());
    }
    const int left = groups - first;
    if (left & 8) body(first, std::integral_constant<int, 8>());
    if (left & 4) body(first + (left & 8), std::integral_constant<int, 4>());
    if (left & 2) body(first + (left & 12), std::integral_constant<int, 2>());
    if (left & 1) body(first + (left & 14), std::integral_constant<int, 1>());
}

// Where column `c` of group `g` of a chunk of n groups is among the chunk's codes.
constexpr int place_in_chunk(int n, int g, int c) { return (c / 4 * n + g) * 4 + c % 4; }

// A row's codes [groups * 64] in the order of the columns -> in that of a packed row.
inline void order_as_packed(const void* codes, int groups, void* packed) {
    for_chunks(groups, [&](int first, auto n) {
        for (int g = 0; g < n; ++g) {
            const char* from = static_cast<const char*>(codes) + (first + g) * kGroup;
            char* to = static_cast<char*>(packed) + first * kGroup;
            for (int c = 0; c < kGroup; c += 4) std::memcpy(to + place_in_chunk(n, g, c), from + c, 4);
        }
    });
}

struct Matrix {
    const uint8_t* high;     // high planes, or the codes of an int8 matrix
    const uint8_t* low;      // low planes; not touched unless the mode is kInt4
    const uint16_t* affine;  // float16 bits
    int rows;
    int cols;
    int groups;
    float gain;  // times the slope in kInt2
    Mode mode;

    int plane_bytes() const { return groups * (mode == Mode::kInt8 ? kGroup : kPlaneGroupBytes); }
    const uint8_t* high_row(int row) const { return high + static_cast<int64_t>(row) * plane_bytes(); }
    const uint8_t* low_row(int row) const { return low + static_cast<int64_t>(row) * plane_bytes(); }
    const uint16_t* affine_row(int row) const { return affine + static_cast<int64_t>(row) * 2 * groups; }
};

// Where one matrix lies within a record; offsets in bytes, checked against the record's size when it is built.
struct MatrixPlace {
    int64_t high, affine, low;
    int rows, cols;
};

struct Record {
    bool int8;
    int64_t bytes;
    int count;
    MatrixPlace places[8];

    // The view of matrix `index` of the record that starts at `base`, read at INT2 depth if `prefix_only`.
    Matrix matrix(const uint8_t* base, int index, bool prefix_only) const {
        const MatrixPlace& place = places[index];
        const float* constants = reinterpret_cast<const float*>(base) + 2 * index;
        const Mode mode = int8 ? Mode::kInt8 : prefix_only ? Mode::kInt2 : Mode::kInt4;
        return {base + place.high,
                mode == Mode::kInt4 ? base + place.low : nullptr,
                reinterpret_cast<const uint16_t*>(base + place.affine),
                place.rows,
                place.cols,
                (place.cols + kGroup - 1) / kGroup,
                mode == Mode::kInt2 ? constants[0] * constants[1] : constants[0],
                mode};
    }
};

}  // namespace fate
