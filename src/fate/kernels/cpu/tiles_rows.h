// Few tokens, row by row. A vector holds the 64 columns of one group; the partial dot products of each of 16 groups
// are transposed and added, which leaves one vector of 16 exact group sums, lanes = groups.
#pragma once

#include "tiles.h"
#include "unpack.h"

namespace fate {
namespace {

constexpr int kRowTokens = 4;  // most tokens of one pass
// How far ahead of use to prefetch: planes in bytes, scales and offsets in values. The processor does not follow the
// thin affine stream by itself, and without it the loop runs at half speed.
constexpr int kPrefetchBytes = 4096;
constexpr int kPrefetchAffines = 1024;

// Rows follow one another, so the bytes this far ahead are the next rows'. A prefetch past the end is not a read.
template <Mode mode>
inline void prefetch_planes(const uint8_t* high, const uint8_t* low) {
    prefetch(high + kPrefetchBytes);
    if constexpr (mode == Mode::kInt4) prefetch(low + kPrefetchBytes);
    if constexpr (mode == Mode::kInt8) {
        for (int line = 1; line < 4; ++line) prefetch(high + kPrefetchBytes + 64 * line);
    }
}

// Up to four groups of one row against `n` tokens; x: byte offset of the first group in a token's codes.
template <Mode mode, int n, int groups>
inline void dot_tokens(const uint8_t* high, const uint8_t* low, const TokenRow* tokens, int64_t x, Quad quads[n]) {
    Codes codes[groups];
    unpack<mode, groups>(high, low, codes);
#pragma GCC unroll 4
    for (int t = 0; t < n; ++t) quads[t] = dot_quad<mode, groups>(codes, tokens[t].codes + x);
}

// Adds 16 groups from group `first`, or, unless `whole`, the row's last, to the lanes of each token. quads[at][t].
template <Mode mode, int n, bool whole>
inline void add_lanes(const Quad quads[4][n], const uint16_t* affine, int groups, int first, const TokenRow* tokens,
                      Floats lanes[n]) {
    const Affine affines = load_affine<mode, whole>(affine, groups, first);
#pragma GCC unroll 4
    for (int t = 0; t < n; ++t) {
        const Floats sums = to_floats(join(quads[0][t], quads[1][t], quads[2][t], quads[3][t]));
        const Floats scales = multiply(affines.scales, load_floats16(tokens[t].scales + first));
        lanes[t] = multiply_add(sums, scales, lanes[t]);
        lanes[t] = multiply_add(affines.offsets, load_floats16(tokens[t].sums + first), lanes[t]);
    }
}

template <Mode mode, int n>
inline void row_outputs(const Matrix& matrix, int row, const TokenRow* tokens, float* tile) {
    constexpr int64_t kStep = mode == Mode::kInt8 ? kGroup : kPlaneGroupBytes;
    const uint8_t* high = matrix.high_row(row);
    const uint8_t* low = mode == Mode::kInt4 ? matrix.low_row(row) : high;
    const uint16_t* affine = matrix.affine_row(row);
    const int groups = matrix.groups;
    Floats lanes[n];
    for (int t = 0; t < n; ++t) lanes[t] = zero_floats();
    int64_t first = 0;
    for (; first + kLanes <= groups; first += kLanes) {
        Quad quads[4][n];
        prefetch(affine + 2 * first + kPrefetchAffines);
#pragma GCC unroll 4
        for (int at = 0; at < 4; ++at) {
            const int64_t g = first + 4 * at;
            prefetch_planes<mode>(high + g * kStep, low + g * kStep);
            dot_tokens<mode, n, 4>(high + g * kStep, low + g * kStep, tokens, g * kGroup, quads[at]);
        }
        add_lanes<mode, n, true>(quads, affine, groups, static_cast<int>(first), tokens, lanes);
    }
    if (first < groups) {
        Quad quads[4][n];
        prefetch(affine + 2 * first + kPrefetchAffines);
#pragma GCC unroll 4
        for (int at = 0; at < 4; ++at) {
            const int64_t g = first + 4 * at, left = groups - g;
            const uint8_t *h = high + g * kStep, *l = low + g * kStep;
            if (left > 0) prefetch_planes<mode>(h, l);
            if (left >= 4) dot_tokens<mode, n, 4>(h, l, tokens, g * kGroup, quads[at]);
            else if (left == 3) dot_tokens<mode, n, 3>(h, l, tokens, g * kGroup, quads[at]);
            else if (left == 2) dot_tokens<mode, n, 2>(h, l, tokens, g * kGroup, quads[at]);
            else if (left == 1) dot_tokens<mode, n, 1>(h, l, tokens, g * kGroup, quads[at]);
            else
                for (int t = 0; t < n; ++t) quads[at][t] = zero_quad();
        }
        add_lanes<mode, n, false>(quads, affine, groups, static_cast<int>(first), tokens, lanes);
    }
    for (int t = 0; t < n; ++t) tile[t * kTileRows] = fold(lanes[t]) * matrix.gain;
}

template <Mode mode>
void tile_rows(const Matrix& matrix, int row, int count, const TokenRow* tokens, int n, float* tile) {
    for (int t = 0; t < n; t += kRowTokens) {
        const int left = n - t;
        float* out = tile + t * kTileRows;
        for (int r = 0; r < count; ++r) {
            if (left >= 4) row_outputs<mode, 4>(matrix, row + r, tokens + t, out + r);
            else if (left == 3) row_outputs<mode, 3>(matrix, row + r, tokens + t, out + r);
            else if (left == 2) row_outputs<mode, 2>(matrix, row + r, tokens + t, out + r);
            else row_outputs<mode, 1>(matrix, row + r, tokens + t, out + r);
        }
    }
}

void simd_rows(const Matrix& matrix, int row, int count, const TokenRow* tokens, int n, float* tile, void*) {
    if (matrix.mode == Mode::kInt4) tile_rows<Mode::kInt4>(matrix, row, count, tokens, n, tile);
    else if (matrix.mode == Mode::kInt2) tile_rows<Mode::kInt2>(matrix, row, count, tokens, n, tile);
    else tile_rows<Mode::kInt8>(matrix, row, count, tokens, n, tile);
}

}  // namespace
}  // namespace fate
