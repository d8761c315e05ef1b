// The tile kernels in plain C++: any processor; compiled for AVX2 too where function clones exist. Its multiply-adds
// round twice, so that every clone gives the same bits.
#include <cstring>

#include "tiles.h"

namespace fate {

namespace {

constexpr int kRowsAtOnce = 4;  // weight rows unpacked together, so that a token's codes are read once for all

inline float multiply_add(float x, float y, float sum) { return x * y + sum; }

// One chunk of `groups` groups (4, 2 or 1) of a plane row: codes shifted left by `up` are or-ed into `out`.
inline void unpack_chunk(const uint8_t* plane, int groups, int up, uint8_t* out) {
    const int bytes = groups * kPlaneGroupBytes;
    for (int part = 0; part < 4; ++part) {
        for (int j = 0; j < bytes; ++j) out[part * bytes + j] |= (plane[j] >> (2 * part) & 3) << up;
    }
}

inline void unpack_plane(const uint8_t* plane, int groups, int up, uint8_t* out) {
    int at = 0;
    for (int size = 4; size >= 1; size /= 2) {
        for (; groups - at >= size; at += size) unpack_chunk(plane + at * kPlaneGroupBytes, size, up, out + at * kGroup);
    }
}

inline void unpack_row(const Matrix& matrix, int row, uint8_t* codes, float* scales, float* offsets) {
    if (matrix.mode == Mode::kInt8) {
        std::memcpy(codes, matrix.high_row(row), matrix.plane_bytes());
    } else {
        std::memset(codes, 0, matrix.groups * kGroup);
        unpack_plane(matrix.high_row(row), matrix.groups, 2, codes);
        if (matrix.mode == Mode::kInt4) unpack_plane(matrix.low_row(row), matrix.groups, 0, codes);
    }
    const uint16_t* affine = matrix.affine_row(row);
    for (int g = 0; g < matrix.groups; ++g) {
        scales[g] = half_to_float(affine[g]);
        const float offset = half_to_float(affine[matrix.groups + g]);
        offsets[g] = matrix.mode == Mode::kInt2 ? multiply_add(1.5f, scales[g], offset) : offset;
    }
}

inline int32_t dot(const uint8_t* codes, const int8_t* activations) {
    int32_t total = 0;
    for (int i = 0; i < kGroup; ++i) {
        total += static_cast<int16_t>(codes[i]) * static_cast<int16_t>(activations[i]);
    }
    return total;
}

inline float fold(float* lane) {
    for (int half = kLanes / 2; half >= 1; half /= 2) {
        for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    return lane[0];
}

int64_t portable_scratch_bytes(int groups) {
    return static_cast<int64_t>(kRowsAtOnce) * groups * (kGroup + 2 * sizeof(float));
}

inline float output(const uint8_t* codes, const float* scales, const float* offsets, const TokenRow& token,
                    int groups) {
    float lane[kLanes] = {};
    for (int g = 0; g < groups; ++g) {
        const float sum = static_cast<float>(dot(codes + g * kGroup, token.codes + g * kGroup));
        float& into = lane[g % kLanes];
        into = multiply_add(sum, scales[g] * token.scales[g], into);
        into = multiply_add(offsets[g], token.sums[g], into);
    }
    return fold(lane);
}

}  // namespace

FATE_CLONES
void portable_rows(const Matrix& matrix, int row, int count, const TokenRow* tokens, int n, float* tile,
                   void* scratch) {
    const int groups = matrix.groups;
    float* scales = static_cast<float*>(scratch);
    float* offsets = scales + kRowsAtOnce * groups;
    uint8_t* codes = reinterpret_cast<uint8_t*>(offsets + kRowsAtOnce * groups);
    for (int first = 0; first < count; first += kRowsAtOnce) {
        const int rows = count - first < kRowsAtOnce ? count - first : kRowsAtOnce;
        for (int r = 0; r < rows; ++r) {
            unpack_row(matrix, row + first + r, codes + r * groups * kGroup, scales + r * groups, offsets + r * groups);
        }
        for (int t = 0; t < n; ++t) {
            for (int r = 0; r < rows; ++r) {
                tile[t * kTileRows + first + r] = matrix.gain * output(codes + r * groups * kGroup, scales + r * groups,
                                                                       offsets + r * groups, tokens[t], groups);
            }
        }
    }
}

const TileKernels kPortableTiles = {"portable", INT32_MAX, portable_scratch_bytes, portable_rows, nullptr};

}  // namespace fate
