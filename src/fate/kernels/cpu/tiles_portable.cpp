// The tile kernels in plain C++, for any processor: what tiles.h says, step by step, and what the kernels of every
// instruction set are compared with.
#include <algorithm>

#include "simd_plain.h"
// after its vector layer
#include "float_rows.h"
#include "tiles.h"

namespace fate {

namespace {

constexpr int kRowsAtOnce = 4;  // weight rows unpacked together, so that a token's codes are read once for all

// One run of a row's planes; `low` is null for an INT2 reader. Codes are widened to 16 bits, which is what lets a
// compiler see a multiply-and-add-pairs instruction in `dot`.
inline void unpack_run(const uint8_t* high, const uint8_t* low, int bytes, int16_t* out) {
    for (int part = 0; part < 4; ++part) {
        const int shift = 2 * part;
        if (low == nullptr) {
            for (int j = 0; j < bytes; ++j) out[part * bytes + j] = (high[j] >> shift & 3) << 2;
        } else {
            for (int j = 0; j < bytes; ++j) {
                out[part * bytes + j] = (high[j] >> shift & 3) << 2 | (low[j] >> shift & 3);
            }
        }
    }
}

// A row's codes in the order of its columns. `packed` [groups * 64] is scratch.
inline void unpack_row(const Matrix& matrix, int row, int16_t* packed, int16_t* codes, float* scales, float* offsets) {
    const uint8_t* high = matrix.high_row(row);
    if (matrix.mode == Mode::kInt8) {
        for (int i = 0; i < matrix.groups * kGroup; ++i) packed[i] = high[i];
    } else {
        const uint8_t* low = matrix.mode == Mode::kInt4 ? matrix.low_row(row) : nullptr;
        for (int at = 0, bytes = 64; at < matrix.plane_bytes(); at += bytes) {
            while (matrix.plane_bytes() - at < bytes) bytes /= 2;
            unpack_run(high + at, low == nullptr ? nullptr : low + at, bytes, packed + 4 * at);
        }
    }
    for_chunks(matrix.groups, [&](int first, auto n) {
        const int16_t* from = packed + first * kGroup;
        for (int g = 0; g < n; ++g) {
            int16_t* to = codes + (first + g) * kGroup;
            for (int c = 0; c < kGroup; c += 4) std::memcpy(to + c, from + place_in_chunk(n, g, c), 8);
        }
    });
    const uint16_t* affine = matrix.affine_row(row);
    for (int g = 0; g < matrix.groups; ++g) {
        scales[g] = half_to_float(affine[g]);
        const float offset = half_to_float(affine[matrix.groups + g]);
        offsets[g] = matrix.mode == Mode::kInt2 ? fused_multiply_add(1.5f, scales[g], offset) : offset;
    }
}

inline int32_t dot(const int16_t* codes, const int8_t* activations) {
    int32_t total = 0;
    for (int i = 0; i < kGroup; ++i) total += codes[i] * static_cast<int16_t>(activations[i]);
    return total;
}

int64_t portable_scratch_bytes(int groups) {
    const int64_t codes = (kRowsAtOnce + 1) * kGroup * sizeof(int16_t), affine = kRowsAtOnce * 2 * sizeof(float);
    return groups * (codes + affine);
}

inline float output(const int16_t* codes, const float* scales, const float* offsets, const TokenRow& token,
                    int groups) {
    Floats sums = zero_floats();
    for (int g = 0; g < groups; ++g) {
        const float sum = static_cast<float>(dot(codes + g * kGroup, token.codes + g * kGroup));
        float& into = sums.lane[g % kLanes];
        into = fused_multiply_add(sum, scales[g] * token.scales[g], into);
        into = fused_multiply_add(offsets[g], token.sums[g], into);
    }
    return fold(sums);
}

void portable_rows(const Matrix& matrix, int row, int count, const TokenRow* tokens, int n, float* tile,
                   void* scratch) {
    const int groups = matrix.groups;
    float* scales = static_cast<float*>(scratch);
    float* offsets = scales + kRowsAtOnce * groups;
    int16_t* codes = reinterpret_cast<int16_t*>(offsets + kRowsAtOnce * groups);
    int16_t* packed = codes + kRowsAtOnce * groups * kGroup;
    for (int first = 0; first < count; first += kRowsAtOnce) {
        const int rows = count - first < kRowsAtOnce ? count - first : kRowsAtOnce;
        for (int r = 0; r < rows; ++r) {
            unpack_row(matrix, row + first + r, packed, codes + r * groups * kGroup, scales + r * groups,
                       offsets + r * groups);
        }
        for (int t = 0; t < n; ++t) {
            for (int r = 0; r < rows; ++r) {
                tile[t * kTileRows + first + r] = matrix.gain * output(codes + r * groups * kGroup, scales + r * groups,
                                                                       offsets + r * groups, tokens[t], groups);
            }
        }
    }
}

}  // namespace

const TileKernels kPortableTiles = {"portable", {INT32_MAX, INT32_MAX, INT32_MAX}, 1, portable_scratch_bytes,
                                    portable_rows, nullptr, simd_dot_rows, simd_add_rows};

}  // namespace fate
