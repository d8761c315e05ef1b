// The vector layer of the tile kernels: what they need of an instruction set, and nothing else. tiles_rows.h and
// tiles_bands.h are written once over it, and tiles_simd.cpp is compiled once for each instruction set. The header of
// that set, chosen below, defines in an anonymous namespace, so that no other file can end up running it:
//
//   Codes                        64 bytes: 64 codes, or 64 bytes of a plane
//     load_codes(at), (at, 16 or 32 bytes), store_codes, fill(byte), both(x, y), either(x, y), select(mask, x, y)
//     shift_left<n>, shift_right<n>    of bytes; what comes in from a neighbour is for the caller to mask off
//     short_bits<n>(plane, v)          the bits of vector v of a run of n, 1 or 2, lowest two of each byte
//   Floats                       16 floats
//     load_floats16, store, broadcast, zero_floats, add, multiply, multiply_add(x, y, z) = x * y + z rounded once
//     load_bfloats(at)                 16 of bfloat16
//     load_halves(at), (at, count)     16, or fewer and zeros beyond: reads no further, but up to 14 bytes before `at`
//     fold(x)                          the sum in the order that tiles.h gives
//   Ints                         16 int32; zero_ints, add, to_floats
//     add_products<mode, n>(sums, codes, x)  n vectors of codes times x [n * 64], four products to a lane
//     spread<n>(x)                     in each lane the sum of the lanes congruent to it modulo n: 8, 4, 2 or 1
//     from_lane(at, x, y)              lanes before `at` of x, the others of y
//   kRowTokens, kChains          most tokens of one pass over a row, and into how many sums the products of few tokens
//                                go, so that they need not wait for one another
//   kDotRows, .., kAddFloats     see float_rows.h
//   kBandVectors, kBandTokens    the shape of the band kernel, without which FATE_BAND_KERNEL is not defined: weight
//                                rows in vectors of 16, and most tokens of one turn
//   kBandsInt4, -Int2, -Int8     from how many tokens it is the faster one, as measured
//     transpose(rows)                  16 rows of 16 four-byte pieces, in place
//     dot_band<mode, n>(block, next, pairs, tokens, x, dots)   one group times n tokens' codes from byte x on ->
//                                      dots[token][vector], lanes = rows; block and pairs: see Pairs; `next` will be
//                                      read after it
//
// Integer sums are exact and every float operation is one rounding in a given order, so all give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "activations.h"
#include "layout.h"

namespace fate {
namespace {

// Byte shuffle indices: 16 of them from byte n on move a vector down by n bytes and fill it up with zeros.
alignas(16) constexpr uint8_t kMoveDown[32] = {
    0,    1,    2,    3,    4,    5,    6,    7,    8,    9,    10,   11,   12,   13,   14,   15,
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

// 16 lanes of no bits, then 16 of all: loaded from lane 16 - at on, a mask of the lanes from `at` on.
alignas(64) constexpr int32_t kFromLane[2 * kLanes] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                                       -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

inline void prefetch(const void* at) { __builtin_prefetch(at, 0, 3); }

// The block of a group in a band is [16 fours][rows][4 columns] in int8. Otherwise two fours share bytes, as they do in
// the planes, and it is [8 pairs][rows][4 columns], the one four in the lower halves and the other in the upper. Which
// they are goes by how many fours of a group one part of a run holds, 1, 2 or 4: of fours 0..15 in chunks of 16 groups
// the pairs are (0, 2) (1, 3) (4, 6) (5, 7) .., of 8 groups (0, 4) (1, 5) (2, 6) (3, 7) (8, 12) .., of fewer (0, 8) ..
struct Pairs {
    int of_part;

    int lower(int pair) const { return pair + (pair & -2 * of_part); }
    int upper(int pair) const { return lower(pair) + 2 * of_part; }
};

}  // namespace
}  // namespace fate

#if defined(__AVX512VNNI__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(__ARM_NEON)
#include "simd_neon.h"
#else
#error "no vector layer for this instruction set: tiles_portable.cpp serves it"
#endif
