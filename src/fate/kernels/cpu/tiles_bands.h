// Several tokens: a band of weight rows is unpacked once for all of them and transposed, so that a vector lane is a row
// and meets four activations of a token, broadcast. No lane is wasted, however many tokens there are.
#pragma once

#include <utility>

#include "tiles.h"
#include "unpack.h"

namespace fate {
namespace {

constexpr int kFours = kGroup / 4;  // columns of a group by fours
constexpr int kBandRows = kBandVectors * kLanes;
constexpr int64_t kFourBytes = kBandRows * 4;
constexpr int64_t kBlockBytes = kFours * kFourBytes;
constexpr int kTurnFloats = kBandTokens * kBandRows;
constexpr int kDepth = 5;  // most lanes, or sums of lanes, that wait for their other half

// Weight rows, the last of them repeated where the matrix ends.
struct Band {
    uint8_t* blocks;  // of the groups (see Pairs in simd.h)
    float* scales;  // [groups][kBandRows]
    float* offsets;
    float* sums;  // [kDepth][kBandTokens][kBandRows]
};

int64_t band_bytes(int groups) {
    return groups * (kBlockBytes + 8 * kBandRows) + static_cast<int64_t>(kDepth) * kTurnFloats * 4;
}

Band band_in(void* scratch, int groups) {
    uint8_t* blocks = static_cast<uint8_t*>(scratch);
    float* scales = reinterpret_cast<float*>(blocks + groups * kBlockBytes);
    float* offsets = scales + groups * kBandRows;
    return {blocks, scales, offsets, offsets + groups * kBandRows};
}

template <Mode mode>
constexpr int64_t block_bytes() {
    return mode == Mode::kInt8 ? kBlockBytes : kBlockBytes / 2;
}

// Fours of a group that one part of a run of a chunk of `groups` groups holds.
constexpr int fours_of_part(int groups) { return groups == 16 ? 1 : groups == 8 ? 2 : 4; }

template <int bytes>
inline Codes load_run(const uint8_t* plane) {
    if constexpr (bytes == 64) return load_codes(plane);
    return load_codes(plane, bytes);
}

// Two codes of a run in each byte (see layout.h): its parts 0 and 2, or, if `odd`, 1 and 3.
template <Mode mode, int bytes, bool odd>
inline Codes load_two_parts(const uint8_t* high, const uint8_t* low) {
    const Codes h = load_run<bytes>(high), upper = odd ? h : shift_left<2>(h);
    if constexpr (mode == Mode::kInt2) return both(upper, fill(0xcc));
    const Codes l = load_run<bytes>(low);
    return select(fill(0xcc), upper, odd ? shift_right<2>(l) : l);
}

inline __attribute__((always_inline)) void prefetch_second(const void* at) { __builtin_prefetch(at, 0, 2); }

// Where a plane's bytes of the same place are in the band that follows.
inline const uint8_t* in_next_band(const Matrix& matrix, const uint8_t* at) {
    return at + kBandRows * matrix.plane_bytes();
}

// Two of the four parts of a run of 16 rows -> its chunk's blocks. `at`: the run's first byte in a row's plane.
template <Mode mode, int groups, bool odd>
inline void unpack_parts(const Matrix& matrix, const int* rows, int64_t at, int run, uint8_t* blocks) {
    constexpr int kRunBytes = groups < 4 ? groups * kPlaneGroupBytes : 64;
    Codes x[kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
        const uint8_t* high = matrix.high_row(rows[r]) + at;
        const uint8_t* low = mode == Mode::kInt4 ? matrix.low_row(rows[r]) + at : nullptr;
        if constexpr (odd) {
            prefetch_second(in_next_band(matrix, high));
            if constexpr (mode == Mode::kInt4) prefetch_second(in_next_band(matrix, low));
        }
        x[r] = load_two_parts<mode, kRunBytes, odd>(high, low);
    }
    transpose(x);
    const int first = (2 * run + odd) * fours_of_part(groups);
#pragma GCC unroll 16
    for (int j = 0; j < kRunBytes / 4; ++j) {
        store_codes(blocks + j % groups * block_bytes<mode>() + (first + j / groups) * kFourBytes, x[j]);
    }
}

// A chunk of 16 rows -> the blocks of its groups.
template <Mode mode, int groups>
inline void unpack_chunk(const Matrix& matrix, const int* rows, int first, uint8_t* blocks) {
    for (int run = 0; run < (groups < 4 ? 1 : groups / 4); ++run) {
        const int64_t at = first * kPlaneGroupBytes + run * 64;
        unpack_parts<mode, groups, false>(matrix, rows, at, run, blocks);
        unpack_parts<mode, groups, true>(matrix, rows, at, run, blocks);
    }
}

template <int groups>
inline void unpack_bytes(const Matrix& matrix, const int* rows, int first, uint8_t* blocks) {
    for (int v = 0; v < groups; ++v) {
        Codes x[kLanes];
        for (int r = 0; r < kLanes; ++r) {
            const uint8_t* codes = matrix.high_row(rows[r]) + (first + v) * kGroup;
            prefetch_second(in_next_band(matrix, codes));
            x[r] = load_codes(codes);
        }
        transpose(x);
        for (int j = 0; j < kLanes; ++j) {
            store_codes(blocks + j % groups * kBlockBytes + (v * kLanes + j) / groups * kFourBytes, x[j]);
        }
    }
}

inline void transpose_floats(const float* values, int count, float* out) {
    Codes x[kLanes];
    for (int r = 0; r < kLanes; ++r) x[r] = load_codes(reinterpret_cast<const uint8_t*>(values + r * kLanes));
    transpose(x);
    for (int g = 0; g < count; ++g) store_codes(reinterpret_cast<uint8_t*>(out + g * kBandRows), x[g]);
}

// Scales and offsets of up to 16 groups of 16 rows.
template <Mode mode>
void unpack_affine(const Matrix& matrix, const int* rows, int group, float* scales, float* offsets) {
    const int count = matrix.groups - group < kLanes ? matrix.groups - group : kLanes;
    alignas(64) float a[kLanes * kLanes], b[kLanes * kLanes];
    for (int r = 0; r < kLanes; ++r) {
        const uint16_t* row = matrix.affine_row(rows[r]);
        const Affine affine = count == kLanes ? load_affine<mode, true>(row, matrix.groups, group)
                                              : load_affine<mode, false>(row, matrix.groups, group);
        store(a + r * kLanes, affine.scales);
        store(b + r * kLanes, affine.offsets);
    }
    transpose_floats(a, count, scales + group * kBandRows);
    transpose_floats(b, count, offsets + group * kBandRows);
}

template <Mode mode>
void unpack_band(const Matrix& matrix, int row, int count, const Band& band) {
    for (int v = 0; v < kBandVectors; ++v) {
        int rows[kLanes];
        for (int r = 0; r < kLanes; ++r) rows[r] = row + (v * kLanes + r < count ? v * kLanes + r : count - 1);
        uint8_t* blocks = band.blocks + v * kGroup;
        for_chunks(matrix.groups, [&](int first, auto groups) {
            uint8_t* own = blocks + first * block_bytes<mode>();
            if constexpr (mode == Mode::kInt8) unpack_bytes<groups>(matrix, rows, first, own);
            else unpack_chunk<mode, groups>(matrix, rows, first, own);
        });
        for (int first = 0; first < matrix.groups; first += kLanes) {
            unpack_affine<mode>(matrix, rows, first, band.scales + v * kLanes, band.offsets + v * kLanes);
        }
    }
}

// The bytes of the band that follows, fetched into the second cache a group's worth at a time while this one is
// multiplied. With few tokens that is soon done, so unpacking this one asks for the planes of that one too.
struct Ahead {
    const uint8_t *high, *low;
    const uint16_t* affine;
    int step;  // bytes of a band's codes of one group, in each plane

    explicit Ahead(const Matrix& matrix, int row)
        : high(matrix.high_row(row)),
          low(matrix.mode == Mode::kInt4 ? matrix.low_row(row) : nullptr),
          affine(matrix.affine_row(row)),
          step(kBandRows * (matrix.mode == Mode::kInt8 ? kGroup : kPlaneGroupBytes)) {}

    // Inlined by force: GCC takes a function that only prefetches for one without effect, and drops its calls.
    __attribute__((always_inline)) void fetch(int group) const {
        const int64_t first = static_cast<int64_t>(group) * step;
        for (int64_t at = first; at < first + step; at += 64) {
            prefetch_second(high + at);
            if (low != nullptr) prefetch_second(low + at);
        }
        for (int line = 0; line < kBandVectors; ++line) prefetch_second(affine + 2 * group * kBandRows + 32 * line);
    }
};

// One group's products, added to the lane of each of n tokens; `first`: the lane has none yet.
template <Mode mode, int n>
inline void add_group(const Band& band, const TokenRow* tokens, int groups, int g, int next, bool first, float* lane) {
    Ints dots[n][kBandVectors];
    const uint8_t* block = band.blocks + g * block_bytes<mode>();
    const Pairs pairs{fours_of_part(chunk_of(groups, g))};
    dot_band<mode, n>(block, band.blocks + next * block_bytes<mode>(), pairs, tokens, g * kGroup, dots);
#pragma GCC unroll 2
    for (int v = 0; v < kBandVectors; ++v) {
        const Floats scales = load_floats16(band.scales + g * kBandRows + v * kLanes);
        const Floats offsets = load_floats16(band.offsets + g * kBandRows + v * kLanes);
#pragma GCC unroll 8
        for (int t = 0; t < n; ++t) {
            float* at = lane + t * kBandRows + v * kLanes;
            const Floats scale = multiply(scales, broadcast(tokens[t].scales[g]));
            const Floats value = multiply_add(to_floats(dots[t][v]), scale, first ? zero_floats() : load_floats16(at));
            store(at, multiply_add(offsets, broadcast(tokens[t].sums[g]), value));
        }
    }
}

constexpr int reversed(int lane) { return (lane & 1) << 3 | (lane & 2) << 1 | (lane & 4) >> 1 | lane >> 3; }

// A band times n tokens. Lanes come in the order that lets each be added to its other half at once (0, 8, 4, 12, ..),
// so that few of them have to be kept.
template <Mode mode, int n>
void band_outputs(const Band& band, const TokenRow* tokens, int groups, float gain, const Ahead* ahead, float* tile) {
    int depth = 0;
    for (int i = 0; i < kLanes; ++i) {
        float* lane = band.sums + depth * kTurnFloats;
        const int first = reversed(i);
        if (first >= groups) std::memset(lane, 0, n * kBandRows * sizeof(float));
        for (int g = first; g < groups; g += kLanes) {
            if (ahead != nullptr) ahead->fetch(g);
            const int next = g + kLanes < groups ? g + kLanes : reversed((i + 1) % kLanes);
            add_group<mode, n>(band, tokens, groups, g, next < groups ? next : 0, g == first, lane);
        }
        for (int k = i; k & 1; k >>= 1, --depth, lane -= kTurnFloats) {
            float* half = lane - kTurnFloats;
            for (int at = 0; at < n * kBandRows; at += kLanes) {
                store(half + at, add(load_floats16(half + at), load_floats16(lane + at)));
            }
        }
        ++depth;
    }
    for (int t = 0; t < n; ++t) {
        for (int v = 0; v < kBandVectors; ++v) {
            const Floats sums = load_floats16(band.sums + t * kBandRows + v * kLanes);
            store(tile + t * kTileRows + v * kLanes, multiply(sums, broadcast(gain)));
        }
    }
}

template <Mode mode, int... counts>
inline void outputs_of(int n, std::integer_sequence<int, counts...>, const Band& band, const TokenRow* tokens,
                       int groups, float gain, const Ahead* ahead, float* tile) {
    ((n == counts + 1 ? band_outputs<mode, counts + 1>(band, tokens, groups, gain, ahead, tile) : void()), ...);
}

template <Mode mode>
void tile_bands(const Matrix& matrix, int row, int count, const TokenRow* tokens, int n, float* tile, void* scratch) {
    const Band band = band_in(scratch, matrix.groups);
    const int turns = (n + kBandTokens - 1) / kBandTokens;
    for (int r = 0; r < count; r += kBandRows) {
        unpack_band<mode>(matrix, row + r, count - r < kBandRows ? count - r : kBandRows, band);
        const Ahead ahead(matrix, row + r + kBandRows);
        for (int turn = 0; turn < turns; ++turn) {  // as even as can be: few tokens leave little to do in parallel
            const int first = n * turn / turns, end = n * (turn + 1) / turns;
            outputs_of<mode>(end - first, std::make_integer_sequence<int, kBandTokens>(), band, tokens + first,
                             matrix.groups, matrix.gain, turn == 0 ? &ahead : nullptr, tile + first * kTileRows + r);
        }
    }
}

void simd_bands(const Matrix& matrix, int row, int count, const TokenRow* tokens, int n, float* tile, void* scratch) {
    if (matrix.mode == Mode::kInt4) tile_bands<Mode::kInt4>(matrix, row, count, tokens, n, tile, scratch);
    else if (matrix.mode == Mode::kInt2) tile_bands<Mode::kInt2>(matrix, row, count, tokens, n, tile, scratch);
    else tile_bands<Mode::kInt8>(matrix, row, count, tokens, n, tile, scratch);
}

}  // namespace
}  // namespace fate
