// What both AVX-512 tile kernels share: unpacking a row's codes, scales and offsets. Included only by files compiled
// for AVX-512; everything here has internal linkage, so that no other file can end up running it.
#pragma once

#include <immintrin.h>

#include "tiles.h"

namespace fate {
namespace {

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

}  // namespace
}  // namespace fate
