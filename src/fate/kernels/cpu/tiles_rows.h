// Few tokens, row by row. A vector holds fours of a chunk's groups, so the products of all of them, added up, are one
// vector of 16 exact sums, lanes = groups.
#pragma once

#include <algorithm>
#include <utility>

#include "tiles.h"
#include "unpack.h"

namespace fate {
namespace {

// How far ahead of use weights are prefetched, in bytes: into the second cache, and from there into the first; scales
// and offsets likewise, in values. The processor does not follow the thin affine stream by itself.
constexpr int kFarBytes = 2048, kNearBytes = 512;
constexpr int kFarAffines = 1024;

// Rows follow one another, so the bytes this far ahead are the next rows'. A prefetch past the end is not a read.
inline __attribute__((always_inline)) void prefetch_line(const uint8_t* at) {
    __builtin_prefetch(at + kFarBytes, 0, 2);
    __builtin_prefetch(at + kNearBytes, 0, 3);
}

template <Mode mode>
inline __attribute__((always_inline)) void prefetch_planes(const uint8_t* high, const uint8_t* low) {
    prefetch_line(high);
    if constexpr (mode == Mode::kInt4) prefetch_line(low);
    if constexpr (mode == Mode::kInt8) {
        for (int line = 1; line < 4; ++line) prefetch_line(high + 64 * line);
    }
}

// Adds the products of a chunk of `groups` groups to the sums of n tokens; x: the chunk's first code of a token.
template <Mode mode, int n, int groups>
inline void add_chunk(const uint8_t* high, const uint8_t* low, const TokenRow* tokens, int64_t x, Ints sums[n]) {
    constexpr int kVectors = groups < 4 ? groups : 4;  // of a run
    constexpr int kRunBytes = kVectors * (mode == Mode::kInt8 ? kGroup : kPlaneGroupBytes);
    constexpr int kRuns = groups / kVectors, kOwnChains = std::clamp(kChains / n, 1, kRuns);
    Ints chains[kOwnChains][n];  // of products that wait for one another
#pragma GCC unroll 4
    for (int run = 0; run < kRuns; ++run) {
        Codes codes[kVectors];
        prefetch_planes<mode>(high + run * kRunBytes, low + run * kRunBytes);
        unpack<mode, kVectors>(high + run * kRunBytes, low + run * kRunBytes, codes);
#pragma GCC unroll 8
        for (int t = 0; t < n; ++t) {
            const Ints before = run == 0 ? sums[t] : run < kOwnChains ? zero_ints() : chains[run % kOwnChains][t];
            chains[run % kOwnChains][t] =
                add_products<mode, kVectors>(before, codes, tokens[t].packed + x + run * kVectors * kGroup);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < n; ++t) {
        sums[t] = chains[0][t];
#pragma GCC unroll 4
        for (int chain = 1; chain < kOwnChains; ++chain) sums[t] = add(sums[t], chains[chain][t]);
    }
}

// The sums of a row's tail of `left` groups, fewer than 16, beginning with a chunk of at most `groups`; the lanes
// beyond hold anything.
template <Mode mode, int n, int groups>
inline void add_tail(const uint8_t* high, const uint8_t* low, const TokenRow* tokens, int64_t x, int left,
                     Ints sums[n]) {
    constexpr int64_t kStep = mode == Mode::kInt8 ? kGroup : kPlaneGroupBytes;
    if ((left & groups) != 0) {
        const int at = left & -2 * groups;  // groups of the tail before these
        Ints own[n];
        for (int t = 0; t < n; ++t) own[t] = zero_ints();
        add_chunk<mode, n, groups>(high + at * kStep, low + at * kStep, tokens, x + at * kGroup, own);
#pragma GCC unroll 8
        for (int t = 0; t < n; ++t) sums[t] = from_lane(at, sums[t], spread<groups>(own[t]));
    }
    if constexpr (groups > 1) add_tail<mode, n, groups / 2>(high, low, tokens, x, left, sums);
}

// Adds 16 groups from group `first`, or, unless `whole`, the row's last, to the lanes of each token.
template <Mode mode, int n, bool whole>
inline void add_lanes(const Ints sums[n], const uint16_t* affine, int groups, int first, const TokenRow* tokens,
                      Floats lanes[n]) {
    const Affine affines = load_affine<mode, whole>(affine, groups, first);
#pragma GCC unroll 8
    for (int t = 0; t < n; ++t) {
        const Floats scales = multiply(affines.scales, load_floats16(tokens[t].scales + first));
        lanes[t] = multiply_add(to_floats(sums[t]), scales, lanes[t]);
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
    for (int first = 0; first < groups; first += kChunkGroups) {
        Ints sums[n];
        for (int t = 0; t < n; ++t) sums[t] = zero_ints();
        prefetch(affine + 2 * first + kFarAffines);
        const uint8_t *h = high + first * kStep, *l = low + first * kStep;
        const int64_t x = static_cast<int64_t>(first) * kGroup;
        if (groups - first >= kChunkGroups) {
            add_chunk<mode, n, kChunkGroups>(h, l, tokens, x, sums);
            add_lanes<mode, n, true>(sums, affine, groups, first, tokens, lanes);
        } else {
            add_tail<mode, n, kChunkGroups / 2>(h, l, tokens, x, groups - first, sums);
            add_lanes<mode, n, false>(sums, affine, groups, first, tokens, lanes);
        }
    }
    for (int t = 0; t < n; ++t) tile[t * kTileRows] = fold(lanes[t]) * matrix.gain;
}

template <Mode mode, int... counts>
inline void rows_of(int n, std::integer_sequence<int, counts...>, const Matrix& matrix, int row, int count,
                    const TokenRow* tokens, float* tile) {
    const auto outputs = [&](auto tokens_at_once) {
        for (int r = 0; r < count; ++r) row_outputs<mode, tokens_at_once>(matrix, row + r, tokens, tile + r);
    };
    ((n == counts + 1 ? outputs(std::integral_constant<int, counts + 1>()) : void()), ...);
}

template <Mode mode>
void tile_rows(const Matrix& matrix, int row, int count, const TokenRow* tokens, int n, float* tile) {
    const int turns = (n + kRowTokens - 1) / kRowTokens;
    for (int turn = 0; turn < turns; ++turn) {
        const int first = n * turn / turns, end = n * (turn + 1) / turns;
        rows_of<mode>(end - first, std::make_integer_sequence<int, kRowTokens>(), matrix, row, count, tokens + first,
                      tile + first * kTileRows);
    }
}

void simd_rows(const Matrix& matrix, int row, int count, const TokenRow* tokens, int n, float* tile, void*) {
    if (matrix.mode == Mode::kInt4) tile_rows<Mode::kInt4>(matrix, row, count, tokens, n, tile);
    else if (matrix.mode == Mode::kInt2) tile_rows<Mode::kInt2>(matrix, row, count, tokens, n, tile);
    else tile_rows<Mode::kInt8>(matrix, row, count, tokens, n, tile);
}

}  // namespace
}  // namespace fate
