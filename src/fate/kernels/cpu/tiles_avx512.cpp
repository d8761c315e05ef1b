// The tile kernels for AVX-512 with VNNI. Two loop orders over the same arithmetic:
//
//   rows    (decode) a vector holds 64 columns of one group; the 16 partial dot products of each of 16 groups are
//           transposed and added, which leaves one vector of 16 exact group sums, lanes = groups.
//   blocks  (prefill) 8 weight rows are unpacked once; a vector holds 4 columns of 16 tokens, lanes = tokens, and
//           meets 4 broadcast weights.
#include <immintrin.h>

#include <cstring>

#include "tiles.h"

namespace fate {

namespace {

constexpr int kOctet = 8;        // weight rows of the block kernel
constexpr int kRowTokens = 4;    // most tokens of one pass of the row kernel
// How far ahead of use to prefetch: planes in bytes, scales and offsets in values. The processor does not follow the
// thin affine stream by itself, and without it the loop runs at half speed.
constexpr int kPrefetchBytes = 4096;
constexpr int kPrefetchAffines = 1024;

inline __m512i load(const void* at) { return _mm512_loadu_si512(at); }

// Bits of `x` where `mask` is set, of `y` elsewhere.
inline __m512i select(__m512i mask, __m512i x, __m512i y) { return _mm512_ternarylogic_epi64(mask, x, y, 0xCA); }

inline __m512i bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

constexpr long long kTwos = 0x0002000200020002, kFours = 2 * kTwos, kSixes = 3 * kTwos;

// 16-bit shift counts for group `group` of a tail: 2 * (part of the tail that each 128-bit lane holds of it).
template <int groups>
inline __m512i tail_shifts(int group) {
    if constexpr (groups == 1) return _mm512_set_epi64(kSixes, kSixes, kFours, kFours, kTwos, kTwos, 0, 0);
    return _mm512_add_epi16(_mm512_set1_epi16(static_cast<short>(4 * group)), _mm512_maskz_set1_epi16(0xffff0000, 2));
}

// A tail's bytes, repeated over a vector.
template <int groups>
inline __m512i load_tail(const uint8_t* plane) {
    if constexpr (groups == 1) return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plane)));
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane)));
}

template <Mode mode, int groups>
inline void unpack_tail(const uint8_t* high, const uint8_t* low, __m512i codes[groups]) {
    const __m512i high_bits = load_tail<groups>(high);
    const __m512i low_bits = mode == Mode::kInt4 ? load_tail<groups>(low) : _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int g = 0; g < groups; ++g) {
        const __m512i shifts = tail_shifts<groups>(g);
        const __m512i h = _mm512_and_si512(_mm512_srlv_epi16(high_bits, shifts), bytes(3));
        const __m512i l = _mm512_and_si512(_mm512_srlv_epi16(low_bits, shifts), bytes(3));
        codes[g] = _mm512_or_si512(_mm512_slli_epi16(h, 2), l);
    }
}

// A chunk of 4 groups, or the last 1 to 3 of a row, as one vector of codes each; in kInt2 the codes are 4h. The count
// is a template argument throughout: vectors in an array of variable length would travel through memory.
template <Mode mode, int groups>
inline void unpack(const uint8_t* high, const uint8_t* low, __m512i codes[groups]) {
    if constexpr (mode == Mode::kInt8) {
#pragma GCC unroll 4
        for (int g = 0; g < groups; ++g) codes[g] = load(high + g * kGroup);
    } else if constexpr (groups < 4) {
        constexpr int pair = groups & 2;
        if constexpr (pair > 0) unpack_tail<mode, 2>(high, low, codes);
        if constexpr ((groups & 1) > 0) {
            unpack_tail<mode, 1>(high + pair * kPlaneGroupBytes, low + pair * kPlaneGroupBytes, codes + pair);
        }
    } else if constexpr (mode == Mode::kInt2) {
        const __m512i h = load(high), mask = bytes(0x0c);
        codes[0] = _mm512_and_si512(_mm512_slli_epi16(h, 2), mask);
        codes[1] = _mm512_and_si512(h, mask);
        codes[2] = _mm512_and_si512(_mm512_srli_epi16(h, 2), mask);
        codes[3] = _mm512_and_si512(_mm512_srli_epi16(h, 4), mask);
    } else {
        // Bits 2-3 and 6-7 of a byte from the high plane, the others from the low: groups 0 and 2, then 1 and 3.
        const __m512i h = load(high), l = load(low), high_half = bytes(0xcc), nibble = bytes(0x0f);
        const __m512i even = select(high_half, _mm512_slli_epi16(h, 2), l);
        const __m512i odd = select(high_half, h, _mm512_srli_epi16(l, 2));
        codes[0] = _mm512_and_si512(even, nibble);
        codes[1] = _mm512_and_si512(odd, nibble);
        codes[2] = _mm512_and_si512(_mm512_srli_epi16(even, 4), nibble);
        codes[3] = _mm512_and_si512(_mm512_srli_epi16(odd, 4), nibble);
    }
}

// Rows follow one another, so the bytes this far ahead are the next rows'. A prefetch past the end is not a read.
template <Mode mode>
inline void prefetch(const uint8_t* high, const uint8_t* low) {
    _mm_prefetch(high + kPrefetchBytes, _MM_HINT_T0);
    if constexpr (mode == Mode::kInt4) _mm_prefetch(low + kPrefetchBytes, _MM_HINT_T0);
    if constexpr (mode == Mode::kInt8) {
        for (int line = 1; line < 4; ++line) _mm_prefetch(high + kPrefetchBytes + 64 * line, _MM_HINT_T0);
    }
}

struct Affine {
    __m512 scales, offsets;
};

// The scales and offsets of up to 16 groups; lanes beyond are zero and their memory is not read.
template <Mode mode>
inline Affine load_affine(const uint16_t* row, int groups, int first) {
    const int left = groups - first;
    const __mmask16 valid = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __m512 scales = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, row + first));
    const __m512 offsets = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, row + groups + first));
    if constexpr (mode == Mode::kInt2) return {scales, _mm512_fmadd_ps(_mm512_set1_ps(1.5f), scales, offsets)};
    return {scales, offsets};
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
            else for (int t = 0; t < n; ++t) quads[at][t] = _mm512_setzero_si512();
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

void avx512_rows(const Matrix& matrix, int row, int count, const TokenRow* tokens, int n, float* tile, void*) {
    if (matrix.mode == Mode::kInt4) tile_rows<Mode::kInt4>(matrix, row, count, tokens, n, tile);
    else if (matrix.mode == Mode::kInt2) tile_rows<Mode::kInt2>(matrix, row, count, tokens, n, tile);
    else tile_rows<Mode::kInt8>(matrix, row, count, tokens, n, tile);
}

// Eight unpacked weight rows. Rows beyond the matrix are zero.
struct Octet {
    uint8_t* codes;  // [8][groups * 64]
    float* scales;   // [8][padded groups]
    float* offsets;
    float* lanes;  // [16 lanes][8 rows][2 blocks][16 tokens]
};

constexpr int64_t kLaneFloats = static_cast<int64_t>(kLanes) * kOctet * 2 * kBlockTokens;

// Bytes from one unpacked row to the next: an odd number of cache lines, so that eight rows do not share L1 sets.
inline int64_t octet_pitch(int groups) { return static_cast<int64_t>(groups | 1) * kGroup; }

int64_t avx512_scratch_bytes(int groups) {
    return kLaneFloats * 4 + kOctet * (octet_pitch(groups) + 8 * padded_groups(groups));
}

Octet octet_in(void* scratch, int groups) {
    float* lanes = static_cast<float*>(scratch);
    float* scales = lanes + kLaneFloats;
    float* offsets = scales + kOctet * padded_groups(groups);
    return {reinterpret_cast<uint8_t*>(offsets + kOctet * padded_groups(groups)), scales, offsets, lanes};
}

template <Mode mode, int groups>
inline void store_codes(const uint8_t* high, const uint8_t* low, uint8_t* out) {
    __m512i codes[groups];
    unpack<mode, groups>(high, low, codes);
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) _mm512_storeu_si512(out + g * kGroup, codes[g]);
}

template <Mode mode>
void unpack_octet(const Matrix& matrix, int row, int count, const Octet& octet) {
    constexpr int kStep = mode == Mode::kInt8 ? kGroup : kPlaneGroupBytes;
    const int groups = matrix.groups, padded = padded_groups(groups);
    for (int r = 0; r < kOctet; ++r) {
        uint8_t* codes = octet.codes + r * octet_pitch(groups);
        if (r >= count) {
            std::memset(codes, 0, static_cast<size_t>(groups) * kGroup);
            std::memset(octet.scales + r * padded, 0, padded * sizeof(float));
            std::memset(octet.offsets + r * padded, 0, padded * sizeof(float));
            continue;
        }
        const uint8_t* high = matrix.high_row(row + r);
        const uint8_t* low = mode == Mode::kInt4 ? matrix.low_row(row + r) : high;
        int g = 0;
        for (; g + 4 <= groups; g += 4) store_codes<mode, 4>(high + g * kStep, low + g * kStep, codes + g * kGroup);
        const int left = groups - g;
        if (left == 3) store_codes<mode, 3>(high + g * kStep, low + g * kStep, codes + g * kGroup);
        else if (left == 2) store_codes<mode, 2>(high + g * kStep, low + g * kStep, codes + g * kGroup);
        else if (left == 1) store_codes<mode, 1>(high + g * kStep, low + g * kStep, codes + g * kGroup);
        for (g = 0; g < groups; g += kLanes) {
            const Affine affines = load_affine<mode>(matrix.affine_row(row + r), groups, g);
            _mm512_storeu_ps(octet.scales + r * padded + g, affines.scales);
            _mm512_storeu_ps(octet.offsets + r * padded + g, affines.offsets);
        }
    }
}

inline __m512i broadcast4(const uint8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, 4);
    return _mm512_set1_epi32(four);
}

// dots += u8 weights * s8 activations, in place: GCC copies the intrinsic's 16 live accumulators around every step.
inline void accumulate(__m512i& dots, __m512i weights, __m512i activations) {
    asm("vpdpbusd %2, %1, %0" : "+v"(dots) : "v"(weights), "v"(activations));
}

// 8 vectors of 16 tokens -> tile[token][0..7].
inline void store_transposed(const __m512 rows[kOctet], float* tile) {
    for (int half = 0; half < 2; ++half) {
        const __m512* r = rows + 4 * half;
        const __m512 lo01 = _mm512_unpacklo_ps(r[0], r[1]), hi01 = _mm512_unpackhi_ps(r[0], r[1]);
        const __m512 lo23 = _mm512_unpacklo_ps(r[2], r[3]), hi23 = _mm512_unpackhi_ps(r[2], r[3]);
        const __m512 tokens[4] = {_mm512_shuffle_ps(lo01, lo23, 0x44), _mm512_shuffle_ps(lo01, lo23, 0xee),
                                  _mm512_shuffle_ps(hi01, hi23, 0x44), _mm512_shuffle_ps(hi01, hi23, 0xee)};
        for (int i = 0; i < 4; ++i) {
            float* out = tile + i * kTileRows + 4 * half;
            _mm_storeu_ps(out, _mm512_extractf32x4_ps(tokens[i], 0));
            _mm_storeu_ps(out + 4 * kTileRows, _mm512_extractf32x4_ps(tokens[i], 1));
            _mm_storeu_ps(out + 8 * kTileRows, _mm512_extractf32x4_ps(tokens[i], 2));
            _mm_storeu_ps(out + 12 * kTileRows, _mm512_extractf32x4_ps(tokens[i], 3));
        }
    }
}

// One group of eight rows against n blocks of 16 tokens, added to lane g % 16.
template <int n>
inline void add_group(const Octet& octet, const int8_t* const* codes, const float* const* scales,
                      const float* const* sums, int groups, int g) {
    __m512i dots[kOctet][n];
#pragma GCC unroll 8
    for (int r = 0; r < kOctet; ++r)
#pragma GCC unroll 2
        for (int b = 0; b < n; ++b) dots[r][b] = _mm512_setzero_si512();
    const uint8_t* weights = octet.codes + g * kGroup;
    const int64_t pitch = octet_pitch(groups);
    for (int four = 0; four < kGroup / 4; ++four) {
        __m512i x[n];
#pragma GCC unroll 2
        for (int b = 0; b < n; ++b) {
            x[b] = load(codes[b] + (g * (kGroup / 4) + four) * 64);
            _mm_prefetch(codes[b] + ((g + 1) * (kGroup / 4) + four) * 64, _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kOctet; ++r) {
            const __m512i w = broadcast4(weights + r * pitch + four * 4);
#pragma GCC unroll 2
            for (int b = 0; b < n; ++b) accumulate(dots[r][b], w, x[b]);
        }
    }
    __m512 scale[n], sum[n];
#pragma GCC unroll 2
    for (int b = 0; b < n; ++b) {
        scale[b] = _mm512_loadu_ps(scales[b] + g * kBlockTokens);
        sum[b] = _mm512_loadu_ps(sums[b] + g * kBlockTokens);
    }
    float* lane = octet.lanes + (g % kLanes) * kOctet * n * kBlockTokens;
    const int padded = padded_groups(groups);
#pragma GCC unroll 8
    for (int r = 0; r < kOctet; ++r) {
        const __m512 a = _mm512_set1_ps(octet.scales[r * padded + g]);
        const __m512 offset = _mm512_set1_ps(octet.offsets[r * padded + g]);
#pragma GCC unroll 2
        for (int b = 0; b < n; ++b) {
            float* at = lane + (r * n + b) * kBlockTokens;
            const __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][b]), _mm512_mul_ps(a, scale[b]),
                                                 _mm512_loadu_ps(at));
            _mm512_storeu_ps(at, _mm512_fmadd_ps(offset, sum[b], value));
        }
    }
}

// Eight rows against n (1 or 2) blocks.
template <int n>
void octet_outputs(const Octet& octet, const TokenBlocks& tokens, int block, float gain, float* tile) {
    const int groups = tokens.groups;
    const int8_t* codes[n];
    const float *scales[n], *sums[n];
    for (int b = 0; b < n; ++b) {
        codes[b] = tokens.block_codes(block + b);
        scales[b] = tokens.block_scales(block + b);
        sums[b] = tokens.block_sums(block + b);
    }
    constexpr int kLane = kOctet * n * kBlockTokens;
    std::memset(octet.lanes, 0, kLanes * kLane * sizeof(float));
    for (int g = 0; g < groups; ++g) add_group<n>(octet, codes, scales, sums, groups, g);
    for (int half = kLanes / 2; half >= 1; half /= 2) {
        for (int i = 0; i < half * kLane; i += kLanes) {
            float* at = octet.lanes + i;
            _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), _mm512_loadu_ps(at + half * kLane)));
        }
    }
    for (int b = 0; b < n; ++b) {
        __m512 rows[kOctet];
        for (int r = 0; r < kOctet; ++r) {
            rows[r] = _mm512_mul_ps(_mm512_loadu_ps(octet.lanes + (r * n + b) * kBlockTokens), _mm512_set1_ps(gain));
        }
        store_transposed(rows, tile + b * kBlockTokens * kTileRows);
    }
}

void avx512_blocks(const Matrix& matrix, int row, int count, const TokenBlocks& tokens, int first, int n, float* tile,
                   void* scratch) {
    const Octet octet = octet_in(scratch, matrix.groups);
    for (int r = 0; r < count; r += kOctet) {
        const int here = count - r < kOctet ? count - r : kOctet;
        if (matrix.mode == Mode::kInt4) unpack_octet<Mode::kInt4>(matrix, row + r, here, octet);
        else if (matrix.mode == Mode::kInt2) unpack_octet<Mode::kInt2>(matrix, row + r, here, octet);
        else unpack_octet<Mode::kInt8>(matrix, row + r, here, octet);
        for (int b = 0; b < n; b += 2) {
            float* out = tile + b * kBlockTokens * kTileRows + r;
            if (b + 2 <= n) octet_outputs<2>(octet, tokens, first + b, matrix.gain, out);
            else octet_outputs<1>(octet, tokens, first + b, matrix.gain, out);
        }
    }
}

}  // namespace

const TileKernels kAvx512Tiles = {"avx512-vnni", 9, avx512_scratch_bytes, avx512_rows, avx512_blocks};

}  // namespace fate
