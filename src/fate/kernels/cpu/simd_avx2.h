// AVX2, with AVX-VNNI or without: 64 codes are two vectors. See simd.h.
//
// Without VNNI, bytes are multiplied and added in pairs to 16 bits. Codes of 4 bits leave room to add up: a pair is at
// most 2 * 15 * 127 = 3810, and eight of them fit. Codes of 8 bits are split into their low seven and their top bit,
// whose pairs just fit (2 * 128 * 127 = 32512), and go to 32 bits at once.
#pragma once

#include <immintrin.h>

#define FATE_BAND_KERNEL

namespace fate {
namespace {

struct Codes {
    __m256i low, high;  // bytes 0..31, 32..63
};
struct Ints {
    __m256i low, high;
};
struct Floats {
    __m256 low, high;
};

#if defined(__AVXVNNI__)
constexpr bool kVnni = true;
inline __m256i add_products(__m256i sums, __m256i codes, __m256i x) { return _mm256_dpbusd_avx_epi32(sums, codes, x); }
#else
constexpr bool kVnni = false;
inline __m256i widen(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
inline __m256i add_products(__m256i sums, __m256i codes, __m256i x) {
    const __m256i seven = _mm256_and_si256(codes, _mm256_set1_epi8(0x7f));
    const __m256i top = _mm256_andnot_si256(_mm256_set1_epi8(0x7f), codes);
    const __m256i both = _mm256_add_epi32(widen(_mm256_maddubs_epi16(seven, x)), widen(_mm256_maddubs_epi16(top, x)));
    return _mm256_add_epi32(sums, both);
}
#endif

inline __m256i load32(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

inline Codes load_codes(const uint8_t* at) { return {load32(at), load32(at + 32)}; }
inline Codes load_codes(const uint8_t* at, int bytes) {
    const __m256i none = _mm256_setzero_si256();
    if (bytes == 16) return {_mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))), none};
    return {load32(at), none};
}
inline void store_codes(uint8_t* at, Codes codes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), codes.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 32), codes.high);
}
inline Codes fill(int value) {
    const __m256i x = _mm256_set1_epi8(static_cast<char>(value));
    return {x, x};
}
inline Codes both(Codes x, Codes y) { return {_mm256_and_si256(x.low, y.low), _mm256_and_si256(x.high, y.high)}; }
inline Codes either(Codes x, Codes y) { return {_mm256_or_si256(x.low, y.low), _mm256_or_si256(x.high, y.high)}; }
inline Codes select(Codes mask, Codes x, Codes y) {
    return either(both(mask, x), {_mm256_andnot_si256(mask.low, y.low), _mm256_andnot_si256(mask.high, y.high)});
}
template <int n>
inline Codes shift_left(Codes x) {
    return {_mm256_slli_epi16(x.low, n), _mm256_slli_epi16(x.high, n)};
}
template <int n>
inline Codes shift_right(Codes x) {
    return {_mm256_srli_epi16(x.low, n), _mm256_srli_epi16(x.high, n)};
}

template <int vectors>
inline Codes short_bits(const uint8_t* plane, int v) {
    if constexpr (vectors == 1) {
        const __m256i bits = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plane)));
        return {_mm256_srlv_epi64(bits, _mm256_setr_epi64x(0, 0, 2, 2)),
                _mm256_srlv_epi64(bits, _mm256_setr_epi64x(4, 4, 6, 6))};
    } else {
        const __m256i bits = load32(plane);
        return {_mm256_srli_epi16(bits, 4 * v), _mm256_srli_epi16(bits, 4 * v + 2)};
    }
}

inline Floats load_floats16(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
inline void store(float* at, Floats x) {
    _mm256_storeu_ps(at, x.low);
    _mm256_storeu_ps(at + 8, x.high);
}
inline Floats broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Floats zero_floats() { return broadcast(0.0f); }
inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.low, y.low), _mm256_add_ps(x.high, y.high)}; }
inline Floats multiply(Floats x, Floats y) { return {_mm256_mul_ps(x.low, y.low), _mm256_mul_ps(x.high, y.high)}; }
inline Floats multiply_add(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)};
}
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }

inline __m256 load_eight_bfloats(const uint16_t* at) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Floats load_bfloats(const uint16_t* at) { return {load_eight_bfloats(at), load_eight_bfloats(at + 8)}; }

inline __m256 load_eight_halves(const uint16_t* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

// Fewer than eight are loaded as the last of eight that end where they end, and moved down.
inline __m256 load_eight_halves(const uint16_t* at, int count) {
    if (count <= 0) return _mm256_setzero_ps();
    const int missing = count < 8 ? 8 - count : 0;
    const __m128i last = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at - missing));
    const __m128i move = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kMoveDown + 2 * missing));
    return _mm256_cvtph_ps(_mm_shuffle_epi8(last, move));
}

inline Floats load_halves(const uint16_t* at) { return {load_eight_halves(at), load_eight_halves(at + 8)}; }
inline Floats load_halves(const uint16_t* at, int count) {
    return {load_eight_halves(at, count), load_eight_halves(at + 8, count - 8)};
}

inline float fold(Floats lanes) {
    const __m256 eight = _mm256_add_ps(lanes.low, lanes.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

constexpr int kDotRows = 2, kDotVectors = 2, kAddVectors = 2, kAddFloats = 2;
constexpr int kRowTokens = 4, kChains = 2;

inline Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Ints add(Ints x, Ints y) {
    return {_mm256_add_epi32(x.low, y.low), _mm256_add_epi32(x.high, y.high)};
}

template <Mode mode, int n>
inline Ints add_products(Ints sums, const Codes codes[n], const int8_t* x) {
    if constexpr (kVnni || mode == Mode::kInt8) {
#pragma GCC unroll 4
        for (int v = 0; v < n; ++v) {
            sums.low = add_products(sums.low, codes[v].low, load32(x + v * kGroup));
            sums.high = add_products(sums.high, codes[v].high, load32(x + v * kGroup + 32));
        }
    } else {
        __m256i low = _mm256_maddubs_epi16(codes[0].low, load32(x));
        __m256i high = _mm256_maddubs_epi16(codes[0].high, load32(x + 32));
#pragma GCC unroll 4
        for (int v = 1; v < n; ++v) {
            low = _mm256_add_epi16(low, _mm256_maddubs_epi16(codes[v].low, load32(x + v * kGroup)));
            high = _mm256_add_epi16(high, _mm256_maddubs_epi16(codes[v].high, load32(x + v * kGroup + 32)));
        }
        const __m256i ones = _mm256_set1_epi16(1);
        sums.low = _mm256_add_epi32(sums.low, _mm256_madd_epi16(low, ones));
        sums.high = _mm256_add_epi32(sums.high, _mm256_madd_epi16(high, ones));
    }
    return sums;
}

template <int n>
inline Ints spread(Ints x) {
    __m256i eight = _mm256_add_epi32(x.low, x.high);
    if constexpr (n < 8) eight = _mm256_add_epi32(eight, _mm256_permute2x128_si256(eight, eight, 1));
    if constexpr (n < 4) eight = _mm256_add_epi32(eight, _mm256_shuffle_epi32(eight, 0x4e));
    if constexpr (n < 2) eight = _mm256_add_epi32(eight, _mm256_shuffle_epi32(eight, 0xb1));
    return {eight, eight};
}

inline Ints from_lane(int at, Ints x, Ints y) {
    const int32_t* of_y = kFromLane + kLanes - at;
    return {_mm256_blendv_epi8(x.low, y.low, load32(of_y)), _mm256_blendv_epi8(x.high, y.high, load32(of_y + 8))};
}

constexpr int kBandVectors = 1, kBandTokens = 4;
constexpr int kBandsInt4 = kVnni ? 12 : 16, kBandsInt2 = kBandsInt4, kBandsInt8 = kVnni ? 32 : 12;

// A square of 8 times 8 dwords: first within 128-bit lanes, then the lanes themselves.
inline void transpose_eight(const __m256i r[8], __m256i out[8]) {
    __m256i fours[2][4];  // [rows 4q..4q+3][c]: column 4i + c in lane i
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q) {
        const __m256i lo01 = _mm256_unpacklo_epi32(r[4 * q], r[4 * q + 1]);
        const __m256i hi01 = _mm256_unpackhi_epi32(r[4 * q], r[4 * q + 1]);
        const __m256i lo23 = _mm256_unpacklo_epi32(r[4 * q + 2], r[4 * q + 3]);
        const __m256i hi23 = _mm256_unpackhi_epi32(r[4 * q + 2], r[4 * q + 3]);
        fours[q][0] = _mm256_unpacklo_epi64(lo01, lo23);
        fours[q][1] = _mm256_unpackhi_epi64(lo01, lo23);
        fours[q][2] = _mm256_unpacklo_epi64(hi01, hi23);
        fours[q][3] = _mm256_unpackhi_epi64(hi01, hi23);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        out[c] = _mm256_permute2x128_si256(fours[0][c], fours[1][c], 0x20);
        out[4 + c] = _mm256_permute2x128_si256(fours[0][c], fours[1][c], 0x31);
    }
}

inline void transpose(Codes rows[kLanes]) {
    __m256i in[2][8], out[2][8];  // [rows 0..7 and 8..15]
    Codes columns[kLanes];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) in[r / 8][r % 8] = half == 0 ? rows[r].low : rows[r].high;
        transpose_eight(in[0], out[0]);
        transpose_eight(in[1], out[1]);
#pragma GCC unroll 8
        for (int c = 0; c < 8; ++c) columns[8 * half + c] = {out[0][c], out[1][c]};
    }
#pragma GCC unroll 16
    for (int c = 0; c < kLanes; ++c) rows[c] = columns[c];
}

inline __m256i load_four(const int8_t* activations) {
    int32_t four;
    std::memcpy(&four, activations, 4);
    return _mm256_set1_epi32(four);
}

template <Mode mode, int n>
inline void dot_band(const uint8_t* block, const uint8_t* next, Pairs pairs, const TokenRow* tokens, int64_t x,
                     Ints dots[n][kBandVectors]) {
    constexpr bool kInPairs = !kVnni && mode != Mode::kInt8;  // 16 bits hold the products of eight fours
    constexpr int kVectors = mode == Mode::kInt8 ? 16 : 8, kTogether = kInPairs ? 4 : kVectors;
    Ints sums[n], halves[n];  // of 32 and of 16 bits
    const auto add_four = [&](const Codes& w, int four) {
#pragma GCC unroll 4
        for (int t = 0; t < n; ++t) {
            const __m256i own = load_four(tokens[t].codes + x + 4 * four);
            if constexpr (kInPairs) {
                halves[t] = {_mm256_add_epi16(halves[t].low, _mm256_maddubs_epi16(w.low, own)),
                            _mm256_add_epi16(halves[t].high, _mm256_maddubs_epi16(w.high, own))};
            } else {
                sums[t] = {add_products(sums[t].low, w.low, own), add_products(sums[t].high, w.high, own)};
            }
        }
    };
#pragma GCC unroll 4
    for (int t = 0; t < n; ++t) sums[t] = zero_ints();
    for (int first = 0; first < kVectors; first += kTogether) {
#pragma GCC unroll 4
        for (int t = 0; t < n; ++t) halves[t] = zero_ints();
        for (int i = first; i < first + kTogether; ++i) {
            prefetch(next + i * 64);
            const Codes codes = load_codes(block + i * 64);
            if constexpr (mode == Mode::kInt8) {
                add_four(codes, i);
            } else {
                add_four(both(codes, fill(0x0f)), pairs.lower(i));
                add_four(both(shift_right<4>(codes), fill(0x0f)), pairs.upper(i));
            }
        }
        if constexpr (kInPairs) {
            const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
            for (int t = 0; t < n; ++t) {
                sums[t] = {_mm256_add_epi32(sums[t].low, _mm256_madd_epi16(halves[t].low, ones)),
                           _mm256_add_epi32(sums[t].high, _mm256_madd_epi16(halves[t].high, ones))};
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < n; ++t) dots[t][0] = sums[t];
}

}  // namespace
}  // namespace fate
