// One packed matrix as the kernels see it. store/format.py and quant/packing.py are the specification.
//
// A matrix [rows, cols] is stored in groups of 64 columns; `groups` = ceil(cols / 64). Per row:
//
//   codes (int8)        groups * 64 bytes, one code per byte
//   high, low (int4)    groups * 16 bytes each: 2-bit planes of the code q = 4h + l
//   affine              float16 [2, groups]: scales a, then offsets b; a weight is gain * (a * q + b)
//
// A plane row is cut into chunks of 4 groups, then at most one of 2 groups and one of 1 (the tail). In a chunk of n
// groups (16n bytes) byte j holds four codes, bits 2k..2k+1 being column k * 16n + j of the chunk. So a 64-byte load
// shifted by 2k and masked is group k, and a tail yields its groups with lane-wise shifts.
#pragma once

#include <cstdint>

namespace fate {

constexpr int kGroup = 64;            // columns that share one scale and one offset
constexpr int kPlaneGroupBytes = 16;  // bytes of one group in a 2-bit plane
constexpr int kLanes = 16;            // partial sums of one output: group g is added to lane g % kLanes
constexpr int kTileRows = 64;         // most weight rows a tile kernel handles at once; the tile's row pitch
constexpr int kTileTokens = 128;      // most tokens a tile kernel handles at once

enum class Mode { kInt4, kInt2, kInt8 };

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
