// Decode: tokens in row form. A vector holds 64 columns of one group; the 16 partial dot products of each of 16 groups
// are transposed and added, which leaves one vector of 16 exact group sums, lanes = groups.
#include "avx512.h"

namespace fate {

namespace {

constexpr int kRowTokens = 4;  // most tokens of one pass
// How far ahead of use to prefetch: planes in bytes, scales and offsets in values. The processor does not follow the
// thin affine stream by itself, and without it the loop runs at half speed.
constexpr int kPrefetchBytes = 4096;
constexpr int kPrefetchAffines = 1024;

// Rows follow one another, so the bytes this far ahead are the next rows'. A prefetch past the end is not a read.
template <Mode mode>
inline void prefetch(const uint8_t* high, const uint8_t* low) {
    _mm_prefetch(high + kPrefetchBytes, _MM_HINT_T0);
    if constexpr (mode == Mode::kInt4) _mm_prefetch(low + kPrefetchBytes, _MM_HINT_T0);
    if constexpr (mode == Mode::kInt8) {
        for (int line = 1; line < 4; ++line) _mm_prefetch(high + kPrefetchBytes + 64 * line, _MM_HINT_T0);
    }
}

// Lane 4i + j of the result: partial sum over 128-bit lane i of d[j].
inline __m512i add_fours(const __m512i d[4]) {
    const __m512i pair0 = _mm512_add_epi32(_mm512_unpacklo_epi32(d[0], d[1]), _mm512_unpackhi_epi32(d[0], d[1]));
    const __m512i pair1 = _mm512_add_epi32(_mm512_unpacklo_epi32(d[2], d[3]), _mm512_unpackhi_epi32(d[2], d[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(pair0, pair1), _mm512_unpackhi_epi64(pair0, pair1));
}

// Lane 4i + j of the result: the sum over the four 128-bit lanes of the i-th argument, element j.
inline __m512i add_quads(__m512i q0, __m512i q1, __m512i q2, __m512i q3) {
    const __m512i half0 = _mm512_add_epi32(_mm512_shuffle_i32x4(q0, q1, 0x88), _mm512_shuffle_i32x4(q0, q1, 0xdd));
    const __m512i half1 = _mm512_add_epi32(_mm512_shuffle_i32x4(q2, q3, 0x88), _mm512_shuffle_i32x4(q2, q3, 0xdd));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(half0, half1, 0x88), _mm512_shuffle_i32x4(half0, half1, 0xdd));
}

inline float fold(__m512 lanes) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// Up to four groups of one row against `n` tokens; x: byte offset of the first group in a token's codes.
template <Mode mode, int n, int groups>
inline void dot_quad(const uint8_t* high, const uint8_t* low, const TokenRow* tokens, int64_t x, __m512i quads[n]) {
    __m512i codes[groups];
    unpack<mode, groups>(high, low, codes);
#pragma GCC unroll 4
    for (int t = 0; t < n; ++t) {
        __m512i d[4];
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
            d[g] = _mm512_setzero_si512();
            if (g < groups) d[g] = _mm512_dpbusd_epi32(d[g], codes[g], load(tokens[t].codes + x + g * kGroup));
        }
        quads[t] = add_fours(d);
    }
}

// Adds 16 groups, from group `first`, to the lanes of each token. quads[at][t].
template <Mode mode, int n>
inline void add_lanes(const __m512i quads[4][n], const uint16_t* affine, int groups, int first, const TokenRow* tokens,
                      __m512 lanes[n]) {
    const Affine affines = load_affine<mode>(affine, groups, first);
#pragma GCC unroll 4
    for (int t = 0; t < n; ++t) {
        const __m512 sums = _mm512_cvtepi32_ps(add_quads(quads[0][t], quads[1][t], quads[2][t], quads[3][t]));
        const __m512 scales = _mm512_mul_ps(affines.scales, _mm512_loadu_ps(tokens[t].scales + first));
        lanes[t] = _mm512_fmadd_ps(sums, scales, lanes[t]);
        lanes[t] = _mm512_fmadd_ps(affines.offsets, _mm512_loadu_ps(tokens[t].sums + first), lanes[t]);
    }
}

template <Mode mode, int n>
inline void row_outputs(const Matrix& matrix, int row, const TokenRow* tokens, float* tile) {
    constexpr int64_t kStep = mode == Mode::kInt8 ? kGroup : kPlaneGroupBytes;
    const uint8_t* high = matrix.high_row(row);
    const uint8_t* low = mode == Mode::kInt4 ? matrix.low_row(row) : high;
    const uint16_t* affine = matrix.affine_row(row);
    const int groups = matrix.groups;
    __m512 lanes[n];
    for (int t = 0; t < n; ++t) lanes[t] = _mm512_setzero_ps();
    int64_t first = 0;
    for (; first + kLanes <= groups; first += kLanes) {
        __m512i quads[4][n];
        _mm_prefetch(affine + 2 * first + kPrefetchAffines, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int at = 0; at < 4; ++at) {
            const int64_t g = first + 4 * at;
            prefetch<mode>(high + g * kStep, low + g * kStep);
            dot_quad<mode, n, 4>(high + g * kStep, low + g * kStep, tokens, g * kGroup, quads[at]);
        }
        add_lanes<mode, n>(quads, affine, groups, static_cast<int>(first), tokens, lanes);
    }
    if (first < groups) {
        __m512i quads[4][n];
        _mm_prefetch(affine + 2 * first + kPrefetchAffines, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int at = 0; at < 4; ++at) {
            const int64_t g = first + 4 * at, left = groups - g;
            const uint8_t *h = high + g * kStep, *l = low + g * kStep;
            if (left > 0) prefetch<mode>(h, l);
            if (left >= 4) dot_quad<mode, n, 4>(h, l, tokens, g * kGroup, quads[at]);
            else if (left == 3) dot_quad<mode, n, 3>(h, l, tokens, g * kGroup, quads[at]);
            else if (left == 2) dot_quad<mode, n, 2>(h, l, tokens, g * kGroup, quads[at]);
            else if (left == 1) dot_quad<mode, n, 1>(h, l, tokens, g * kGroup, quads[at]);
            else
                for (int t = 0; t < n; ++t) quads[at][t] = _mm512_setzero_si512();
        }
        add_lanes<mode, n>(quads, affine, groups, static_cast<int>(first), tokens, lanes);
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

}  // namespace

void avx512_rows(const Matrix& matrix, int row, int count, const TokenRow* tokens, int n, float* tile, void*) {
    if (matrix.mode == Mode::kInt4) tile_rows<Mode::kInt4>(matrix, row, count, tokens, n, tile);
    else if (matrix.mode == Mode::kInt2) tile_rows<Mode::kInt2>(matrix, row, count, tokens, n, tile);
    else tile_rows<Mode::kInt8>(matrix, row, count, tokens, n, tile);
}

}  // namespace fate
