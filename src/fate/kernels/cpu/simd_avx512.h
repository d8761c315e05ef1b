// AVX-512 with VNNI: 64 codes are one vector. See simd.h.
#pragma once

#include <immintrin.h>

#define FATE_BAND_KERNEL

namespace fate {
namespace {

using Codes = __m512i;
using Ints = __m512i;
using Floats = __m512;

inline Codes load_codes(const void* at) { return _mm512_loadu_si512(at); }
inline void store_codes(uint8_t* at, Codes codes) { _mm512_storeu_si512(at, codes); }
inline Codes fill(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
inline Codes both(Codes x, Codes y) { return _mm512_and_si512(x, y); }
inline Codes either(Codes x, Codes y) { return _mm512_or_si512(x, y); }
inline Codes select(Codes mask, Codes x, Codes y) { return _mm512_ternarylogic_epi64(mask, x, y, 0xCA); }
template <int n>
inline Codes shift_left(Codes x) {
    return _mm512_slli_epi16(x, n);
}
template <int n>
inline Codes shift_right(Codes x) {
    return _mm512_srli_epi16(x, n);
}

inline Codes load_codes(const uint8_t* at, int bytes) {
    return _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - bytes), at);
}

// The run's bytes are repeated over the vector, and each 128-bit lane is shifted to the part that it holds of vector v.
template <int vectors>
inline Codes short_bits(const uint8_t* plane, int v) {
    constexpr long long kTwos = 0x0002000200020002;
    if constexpr (vectors == 1) {
        const __m512i shifts =
            _mm512_set_epi64(3 * kTwos, 3 * kTwos, 2 * kTwos, 2 * kTwos, kTwos, kTwos, 0, 0);
        return _mm512_srlv_epi16(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plane))),
                                 shifts);
    } else {
        const __m512i shifts =
            _mm512_add_epi16(_mm512_set1_epi16(static_cast<short>(4 * v)), _mm512_maskz_set1_epi16(0xffff0000, 2));
        return _mm512_srlv_epi16(_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane))),
                                 shifts);
    }
}

inline Floats load_floats16(const float* at) { return _mm512_loadu_ps(at); }
inline void store(float* at, Floats x) { _mm512_storeu_ps(at, x); }
inline Floats broadcast(float value) { return _mm512_set1_ps(value); }
inline Floats zero_floats() { return _mm512_setzero_ps(); }
inline Floats add(Floats x, Floats y) { return _mm512_add_ps(x, y); }
inline Floats multiply(Floats x, Floats y) { return _mm512_mul_ps(x, y); }
inline Floats multiply_add(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x, y, z); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }

inline Floats load_bfloats(const uint16_t* at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_epi16(at)), 16));
}
inline Floats load_halves(const uint16_t* at) { return _mm512_cvtph_ps(_mm256_loadu_epi16(at)); }
inline Floats load_halves(const uint16_t* at, int count) {
    const __mmask16 valid = static_cast<__mmask16>((1u << count) - 1);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, at));
}

inline float fold(Floats lanes) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

constexpr int kDotRows = 4, kDotVectors = 4, kAddVectors = 4, kAddFloats = 4;
constexpr int kRowTokens = 8, kChains = 4;

inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Ints add(Ints x, Ints y) { return _mm512_add_epi32(x, y); }

// sums += u8 weights * s8 activations, in place: GCC copies the intrinsic's live accumulators around every step.
inline void accumulate(__m512i& sums, __m512i weights, __m512i activations) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(activations));
}

template <Mode mode, int n>
inline Ints add_products(Ints sums, const Codes codes[n], const int8_t* x) {
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) sums = _mm512_dpbusd_epi32(sums, codes[v], load_codes(x + v * kGroup));
    return sums;
}

template <int n>
inline Ints spread(Ints x) {
    x = _mm512_add_epi32(x, _mm512_shuffle_i64x2(x, x, 0x4e));
    if constexpr (n < 8) x = _mm512_add_epi32(x, _mm512_shuffle_i64x2(x, x, 0xb1));
    if constexpr (n < 4) x = _mm512_add_epi32(x, _mm512_shuffle_epi32(x, static_cast<_MM_PERM_ENUM>(0x4e)));
    if constexpr (n < 2) x = _mm512_add_epi32(x, _mm512_shuffle_epi32(x, static_cast<_MM_PERM_ENUM>(0xb1)));
    return x;
}

inline Ints from_lane(int at, Ints x, Ints y) {
    return _mm512_mask_mov_epi32(x, static_cast<__mmask16>(0xffffu << at), y);
}

constexpr int kBandVectors = 2, kBandTokens = 8;
constexpr int kBandsInt4 = 9, kBandsInt2 = 10, kBandsInt8 = 22;

// A square of 16 times 16 dwords: first within 128-bit lanes, then the lanes themselves.
inline void transpose(Codes rows[kLanes]) {
    __m512i fours[4][4];  // [rows 4q..4q+3][c]: column 4i + c in lane i
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
        const Codes* r = rows + 4 * q;
        const __m512i lo01 = _mm512_unpacklo_epi32(r[0], r[1]), hi01 = _mm512_unpackhi_epi32(r[0], r[1]);
        const __m512i lo23 = _mm512_unpacklo_epi32(r[2], r[3]), hi23 = _mm512_unpackhi_epi32(r[2], r[3]);
        fours[q][0] = _mm512_unpacklo_epi64(lo01, lo23);
        fours[q][1] = _mm512_unpackhi_epi64(lo01, lo23);
        fours[q][2] = _mm512_unpacklo_epi64(hi01, hi23);
        fours[q][3] = _mm512_unpackhi_epi64(hi01, hi23);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i even01 = _mm512_shuffle_i32x4(fours[0][c], fours[1][c], 0x88);
        const __m512i odd01 = _mm512_shuffle_i32x4(fours[0][c], fours[1][c], 0xdd);
        const __m512i even23 = _mm512_shuffle_i32x4(fours[2][c], fours[3][c], 0x88);
        const __m512i odd23 = _mm512_shuffle_i32x4(fours[2][c], fours[3][c], 0xdd);
        rows[c] = _mm512_shuffle_i32x4(even01, even23, 0x88);
        rows[4 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
        rows[8 + c] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
        rows[12 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
    }
}

// One vector of codes per 16 rows, times a four of each of n tokens.
template <int n>
inline void add_four(const Codes codes[kBandVectors], const int8_t* const x[n], int64_t at,
                     Ints dots[n][kBandVectors]) {
#pragma GCC unroll 8
    for (int t = 0; t < n; ++t) {
        int32_t own;
        std::memcpy(&own, x[t] + at, 4);
        const __m512i activations = _mm512_set1_epi32(own);
        accumulate(dots[t][0], codes[0], activations);
        accumulate(dots[t][1], codes[1], activations);
    }
}

template <Mode mode, int n>
inline void dot_band(const uint8_t* block, const uint8_t* next, Pairs pairs, const TokenRow* tokens, int64_t x,
                     Ints dots[n][kBandVectors]) {
    const int8_t* columns[n];
#pragma GCC unroll 8
    for (int t = 0; t < n; ++t) {
        columns[t] = tokens[t].codes + x;
        dots[t][0] = dots[t][1] = _mm512_setzero_si512();
    }
    for (int i = 0; i < (mode == Mode::kInt8 ? 16 : 8); ++i, block += 128, next += 128) {
        prefetch(next);
        prefetch(next + 64);
        const Codes codes[2] = {load_codes(block), load_codes(block + 64)};
        if constexpr (mode == Mode::kInt8) {
            add_four<n>(codes, columns, 4 * i, dots);
        } else {
            const Codes nibble = fill(0x0f);
            const Codes lower[2] = {both(codes[0], nibble), both(codes[1], nibble)};
            add_four<n>(lower, columns, 4 * pairs.lower(i), dots);
            const Codes upper[2] = {both(shift_right<4>(codes[0]), nibble), both(shift_right<4>(codes[1]), nibble)};
            add_four<n>(upper, columns, 4 * pairs.upper(i), dots);
        }
    }
}

}  // namespace
}  // namespace fate
