// AVX-512 with VNNI: a group is one vector. See simd.h.
#pragma once

#include <immintrin.h>

#define FATE_BAND_KERNEL

namespace fate {
namespace {

using Codes = __m512i;
using Ints = __m512i;
using Quad = __m512i;
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

// The tail's bytes are repeated over the vector, and each 128-bit lane is shifted to the part that it holds of group g.
template <int groups>
inline Codes tail_bits(const uint8_t* plane, int g) {
    constexpr long long kTwos = 0x0002000200020002;
    if constexpr (groups == 1) {
        const __m512i shifts =
            _mm512_set_epi64(3 * kTwos, 3 * kTwos, 2 * kTwos, 2 * kTwos, kTwos, kTwos, 0, 0);
        return _mm512_srlv_epi16(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plane))),
                                 shifts);
    } else {
        const __m512i shifts =
            _mm512_add_epi16(_mm512_set1_epi16(static_cast<short>(4 * g)), _mm512_maskz_set1_epi16(0xffff0000, 2));
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

inline Quad zero_quad() { return _mm512_setzero_si512(); }

// Lane 4i + j of the result: what 128-bit lane i sums of group j.
template <Mode mode, int groups>
inline Quad dot_quad(const Codes codes[groups], const int8_t* x) {
    __m512i d[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
        d[g] = _mm512_setzero_si512();
        if (g < groups) d[g] = _mm512_dpbusd_epi32(d[g], codes[g], load_codes(x + g * kGroup));
    }
    const __m512i pair0 = _mm512_add_epi32(_mm512_unpacklo_epi32(d[0], d[1]), _mm512_unpackhi_epi32(d[0], d[1]));
    const __m512i pair1 = _mm512_add_epi32(_mm512_unpacklo_epi32(d[2], d[3]), _mm512_unpackhi_epi32(d[2], d[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(pair0, pair1), _mm512_unpackhi_epi64(pair0, pair1));
}

inline Ints join(Quad q0, Quad q1, Quad q2, Quad q3) {
    const __m512i half0 = _mm512_add_epi32(_mm512_shuffle_i32x4(q0, q1, 0x88), _mm512_shuffle_i32x4(q0, q1, 0xdd));
    const __m512i half1 = _mm512_add_epi32(_mm512_shuffle_i32x4(q2, q3, 0x88), _mm512_shuffle_i32x4(q2, q3, 0xdd));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(half0, half1, 0x88), _mm512_shuffle_i32x4(half0, half1, 0xdd));
}

constexpr int kBandVectors = 2, kBandTokens = 8, kBandMinTokens = 4;

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

// dots += u8 weights * s8 activations, in place: GCC copies the intrinsic's live accumulators around every step.
inline void accumulate(__m512i& dots, __m512i weights, __m512i activations) {
    asm("vpdpbusd %2, %1, %0" : "+v"(dots) : "v"(weights), "v"(activations));
}

template <Mode mode, bool upper, int n>
inline void dot_band(const uint8_t* block, const uint8_t* next, const TokenRow* tokens, int64_t x,
                     Ints dots[n][kBandVectors]) {
    const auto codes = [](const uint8_t* at) {
        if constexpr (mode == Mode::kInt8) return load_codes(at);
        return both(shift_right<upper ? 4 : 0>(load_codes(at)), fill(0x0f));
    };
    const int8_t* columns[n];
#pragma GCC unroll 8
    for (int t = 0; t < n; ++t) {
        columns[t] = tokens[t].codes + x;
        dots[t][0] = dots[t][1] = _mm512_setzero_si512();
    }
    for (int four = 0; four < kGroup / 4; ++four) {
        prefetch(next + four * 128);
        prefetch(next + four * 128 + 64);
        const __m512i first = codes(block + four * 128), second = codes(block + four * 128 + 64);
#pragma GCC unroll 8
        for (int t = 0; t < n; ++t) {
            int32_t own;
            std::memcpy(&own, columns[t] + four * 4, 4);
            const __m512i activations = _mm512_set1_epi32(own);
            accumulate(dots[t][0], first, activations);
            accumulate(dots[t][1], second, activations);
        }
    }
}

}  // namespace
}  // namespace fate
