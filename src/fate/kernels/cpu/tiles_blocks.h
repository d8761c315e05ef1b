// Prefill: tokens in block form. A band of kBlockRows weight rows is unpacked once for all tokens; vectors hold 4
// columns of 16 tokens and meet 4 broadcast weights, lanes = tokens.
#pragma once

#include "tiles.h"
#include "unpack.h"

namespace fate {
namespace {

// Unpacked weight rows. Rows beyond the matrix are zero.
struct Band {
    uint8_t* codes;  // [kBlockRows][groups * 64], band_pitch apart
    float* scales;   // [kBlockRows][padded groups]
    float* offsets;
    float* lanes;  // [16 lanes][kBlockRows][kBlocksAtOnce][16 tokens]
};

constexpr int64_t kLaneFloats = static_cast<int64_t>(kLanes) * kBlockRows * kBlocksAtOnce * kBlockTokens;

// Bytes from one unpacked row to the next: an odd number of cache lines, so that the rows do not share L1 sets.
inline int64_t band_pitch(int groups) { return static_cast<int64_t>(groups | 1) * kGroup; }

int64_t band_bytes(int groups) {
    return kLaneFloats * 4 + kBlockRows * (band_pitch(groups) + 8 * padded_groups(groups));
}

Band band_in(void* scratch, int groups) {
    float* lanes = static_cast<float*>(scratch);
    float* scales = lanes + kLaneFloats;
    float* offsets = scales + kBlockRows * padded_groups(groups);
    return {reinterpret_cast<uint8_t*>(offsets + kBlockRows * padded_groups(groups)), scales, offsets, lanes};
}

template <Mode mode, int groups>
inline void unpack_to(const uint8_t* high, const uint8_t* low, uint8_t* out) {
    Codes codes[groups];
    unpack<mode, groups>(high, low, codes);
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) store_codes(out + g * kGroup, codes[g]);
}

inline void store_affine(const Affine& affine, float* scales, float* offsets) {
    store(scales, affine.scales);
    store(offsets, affine.offsets);
}

template <Mode mode>
void unpack_band(const Matrix& matrix, int row, int count, const Band& band) {
    constexpr int kStep = mode == Mode::kInt8 ? kGroup : kPlaneGroupBytes;
    const int groups = matrix.groups, padded = padded_groups(groups);
    for (int r = 0; r < kBlockRows; ++r) {
        uint8_t* codes = band.codes + r * band_pitch(groups);
        if (r >= count) {
            std::memset(codes, 0, static_cast<size_t>(groups) * kGroup);
            std::memset(band.scales + r * padded, 0, padded * sizeof(float));
            std::memset(band.offsets + r * padded, 0, padded * sizeof(float));
            continue;
        }
        const uint8_t* high = matrix.high_row(row + r);
        const uint8_t* low = mode == Mode::kInt4 ? matrix.low_row(row + r) : high;
        int g = 0;
        for (; g + 4 <= groups; g += 4) unpack_to<mode, 4>(high + g * kStep, low + g * kStep, codes + g * kGroup);
        const int left = groups - g;
        if (left == 3) unpack_to<mode, 3>(high + g * kStep, low + g * kStep, codes + g * kGroup);
        else if (left == 2) unpack_to<mode, 2>(high + g * kStep, low + g * kStep, codes + g * kGroup);
        else if (left == 1) unpack_to<mode, 1>(high + g * kStep, low + g * kStep, codes + g * kGroup);
        for (g = 0; g < groups; g += kLanes) {
            const uint16_t* affine = matrix.affine_row(row + r);
            float *scales = band.scales + r * padded + g, *offsets = band.offsets + r * padded + g;
            if (groups - g >= kLanes) store_affine(load_affine<mode, true>(affine, groups, g), scales, offsets);
            else store_affine(load_affine<mode, false>(affine, groups, g), scales, offsets);
        }
    }
}

// One group of the band against n blocks of 16 tokens, added to lane g % 16.
template <Mode mode, int n>
inline void add_group(const Band& band, const int8_t* const* codes, const float* const* scales,
                      const float* const* sums, int groups, int g) {
    Ints dots[kBlockRows][n];
    const int8_t* x[n];
    Floats scale[n], sum[n];
#pragma GCC unroll 2
    for (int b = 0; b < n; ++b) x[b] = codes[b] + g * kGroup * kBlockTokens;
    dot_blocks<mode, n>(band.codes + g * kGroup, band_pitch(groups), x, dots);
#pragma GCC unroll 2
    for (int b = 0; b < n; ++b) {
        scale[b] = load_floats16(scales[b] + g * kBlockTokens);
        sum[b] = load_floats16(sums[b] + g * kBlockTokens);
    }
    float* lane = band.lanes + (g % kLanes) * kBlockRows * n * kBlockTokens;
    const int padded = padded_groups(groups);
#pragma GCC unroll 8
    for (int r = 0; r < kBlockRows; ++r) {
        const Floats a = broadcast(band.scales[r * padded + g]);
        const Floats offset = broadcast(band.offsets[r * padded + g]);
#pragma GCC unroll 2
        for (int b = 0; b < n; ++b) {
            float* at = lane + (r * n + b) * kBlockTokens;
            const Floats value = multiply_add(to_floats(dots[r][b]), multiply(a, scale[b]), load_floats16(at));
            store(at, multiply_add(offset, sum[b], value));
        }
    }
}

// The bytes of the band to unpack next, fetched a group's worth at a time while this one is multiplied.
struct Ahead {
    const uint8_t *high, *low;
    const uint16_t* affine;
    int step;  // bytes of a band's codes of one group, in each plane

    explicit Ahead(const Matrix& matrix, int row)
        : high(matrix.high_row(row)),
          low(matrix.mode == Mode::kInt4 ? matrix.low_row(row) : nullptr),
          affine(matrix.affine_row(row)),
          step(kBlockRows * (matrix.mode == Mode::kInt8 ? kGroup : kPlaneGroupBytes)) {}

    void fetch(int group) const {
        const int64_t first = static_cast<int64_t>(group) * step;
        for (int64_t at = first; at < first + step; at += 64) {
            prefetch(high + at);
            if (low != nullptr) prefetch(low + at);
        }
        prefetch(affine + static_cast<int64_t>(group) * 2 * kBlockRows);
    }
};

// A band against n (1 or kBlocksAtOnce) blocks.
template <Mode mode, int n>
void band_outputs(const Band& band, const TokenBlocks& tokens, int block, float gain, const Ahead* ahead, float* tile) {
    const int groups = tokens.groups;
    const int8_t* codes[n];
    const float *scales[n], *sums[n];
    for (int b = 0; b < n; ++b) {
        codes[b] = tokens.block_codes(block + b);
        scales[b] = tokens.block_scales(block + b);
        sums[b] = tokens.block_sums(block + b);
    }
    constexpr int kLane = kBlockRows * n * kBlockTokens;
    std::memset(band.lanes, 0, kLanes * kLane * sizeof(float));
    for (int g = 0; g < groups; ++g) {
        if (ahead != nullptr) ahead->fetch(g);
        add_group<mode, n>(band, codes, scales, sums, groups, g);
    }
    for (int half = kLanes / 2; half >= 1; half /= 2) {
        for (int i = 0; i < half * kLane; i += kLanes) {
            float* at = band.lanes + i;
            store(at, add(load_floats16(at), load_floats16(at + half * kLane)));
        }
    }
    for (int b = 0; b < n; ++b) {
        Floats rows[kBlockRows];
#pragma GCC unroll 8
        for (int r = 0; r < kBlockRows; ++r) {
            rows[r] = multiply(load_floats16(band.lanes + (r * n + b) * kBlockTokens), broadcast(gain));
        }
        store_transposed(rows, tile + b * kBlockTokens * kTileRows);
    }
}

template <Mode mode>
void tile_blocks(const Matrix& matrix, int row, int count, const TokenBlocks& tokens, int first, int n, float* tile,
                 void* scratch) {
    const Band band = band_in(scratch, matrix.groups);
    for (int r = 0; r < count; r += kBlockRows) {
        unpack_band<mode>(matrix, row + r, count - r < kBlockRows ? count - r : kBlockRows, band);
        const Ahead ahead(matrix, row + r + kBlockRows);
        for (int b = 0; b < n; b += kBlocksAtOnce) {
            float* out = tile + b * kBlockTokens * kTileRows + r;
            const Ahead* fetched = b == 0 ? &ahead : nullptr;
            if (b + kBlocksAtOnce <= n) {
                band_outputs<mode, kBlocksAtOnce>(band, tokens, first + b, matrix.gain, fetched, out);
            } else {
                band_outputs<mode, 1>(band, tokens, first + b, matrix.gain, fetched, out);
            }
        }
    }
}

void simd_blocks(const Matrix& matrix, int row, int count, const TokenBlocks& tokens, int first, int n, float* tile,
                 void* scratch) {
    if (matrix.mode == Mode::kInt4) tile_blocks<Mode::kInt4>(matrix, row, count, tokens, first, n, tile, scratch);
    else if (matrix.mode == Mode::kInt2) tile_blocks<Mode::kInt2>(matrix, row, count, tokens, first, n, tile, scratch);
    else tile_blocks<Mode::kInt8>(matrix, row, count, tokens, first, n, tile, scratch);
}

}  // namespace
}  // namespace fate
