// NEON, with dot products (Armv8.2) or without: 64 codes are four vectors. See simd.h.
//
// Both multiply signed bytes: codes of 4 bits are that already; codes of 8 bits, less 128, are, and 128 times the sum
// of the activations is added again. Without dot products there is no band kernel: rows serve any number of tokens.
#pragma once

#include <arm_neon.h>

#if defined(__ARM_FEATURE_DOTPROD)
#define FATE_BAND_KERNEL
#endif

namespace fate {
namespace {

struct Codes {
    uint8x16_t part[4];
};
struct Ints {
    int32x4_t part[4];
};
struct Floats {
    float32x4_t part[4];
};

// {f(0), f(1), f(2), f(3)}: a vector of four parts, without a loop that a compiler might keep.
template <typename V, typename F>
inline V parts(F f) {
    return {{f(0), f(1), f(2), f(3)}};
}

inline Codes load_codes(const uint8_t* at) {
    return parts<Codes>([&](int p) { return vld1q_u8(at + 16 * p); });
}
inline Codes load_codes(const uint8_t* at, int bytes) {
    return parts<Codes>([&](int p) { return 16 * p < bytes ? vld1q_u8(at + 16 * p) : vdupq_n_u8(0); });
}
inline void store_codes(uint8_t* at, Codes codes) {
    for (int p = 0; p < 4; ++p) vst1q_u8(at + 16 * p, codes.part[p]);
}
inline Codes fill(int value) {
    return parts<Codes>([&](int) { return vdupq_n_u8(static_cast<uint8_t>(value)); });
}
inline Codes both(Codes x, Codes y) {
    return parts<Codes>([&](int p) { return vandq_u8(x.part[p], y.part[p]); });
}
inline Codes either(Codes x, Codes y) {
    return parts<Codes>([&](int p) { return vorrq_u8(x.part[p], y.part[p]); });
}
inline Codes select(Codes mask, Codes x, Codes y) {
    return parts<Codes>([&](int p) { return vbslq_u8(mask.part[p], x.part[p], y.part[p]); });
}
template <int n>
inline Codes shift_left(Codes x) {
    return parts<Codes>([&](int p) { return vshlq_n_u8(x.part[p], n); });
}
template <int n>
inline Codes shift_right(Codes x) {
    return parts<Codes>([&](int p) { return vshrq_n_u8(x.part[p], n); });
}

template <int vectors>
inline Codes short_bits(const uint8_t* plane, int v) {
    return parts<Codes>([&](int p) {
        const int at = vectors == 1 ? 0 : p % 2 * 16, shift = vectors == 1 ? 2 * p : 4 * v + p / 2 * 2;
        return vshlq_u8(vld1q_u8(plane + at), vdupq_n_s8(static_cast<int8_t>(-shift)));
    });
}

inline Floats load_floats16(const float* at) {
    return parts<Floats>([&](int p) { return vld1q_f32(at + 4 * p); });
}
inline void store(float* at, Floats x) {
    for (int p = 0; p < 4; ++p) vst1q_f32(at + 4 * p, x.part[p]);
}
inline Floats broadcast(float value) {
    return parts<Floats>([&](int) { return vdupq_n_f32(value); });
}
inline Floats zero_floats() { return broadcast(0.0f); }
inline Floats add(Floats x, Floats y) {
    return parts<Floats>([&](int p) { return vaddq_f32(x.part[p], y.part[p]); });
}
inline Floats multiply(Floats x, Floats y) {
    return parts<Floats>([&](int p) { return vmulq_f32(x.part[p], y.part[p]); });
}
inline Floats multiply_add(Floats x, Floats y, Floats z) {
    return parts<Floats>([&](int p) { return vfmaq_f32(z.part[p], x.part[p], y.part[p]); });
}
inline Floats to_floats(Ints x) {
    return parts<Floats>([&](int p) { return vcvtq_f32_s32(x.part[p]); });
}

inline Floats load_bfloats(const uint16_t* at) {
    return parts<Floats>([&](int p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(at + 4 * p), 16)); });
}

inline float16x8_t load_eight_halves(const uint16_t* at) { return vreinterpretq_f16_u16(vld1q_u16(at)); }

// Fewer than eight are loaded as the last of eight that end where they end, and moved down.
inline float16x8_t load_eight_halves(const uint16_t* at, int count) {
    if (count <= 0) return vreinterpretq_f16_u16(vdupq_n_u16(0));
    const int missing = count < 8 ? 8 - count : 0;
    const uint8x16_t last = vreinterpretq_u8_u16(vld1q_u16(at - missing));
    return vreinterpretq_f16_u8(vqtbl1q_u8(last, vld1q_u8(kMoveDown + 2 * missing)));
}

inline Floats widen(float16x8_t first, float16x8_t second) {
    return {{vcvt_f32_f16(vget_low_f16(first)), vcvt_high_f32_f16(first), vcvt_f32_f16(vget_low_f16(second)),
             vcvt_high_f32_f16(second)}};
}
inline Floats load_halves(const uint16_t* at) { return widen(load_eight_halves(at), load_eight_halves(at + 8)); }
inline Floats load_halves(const uint16_t* at, int count) {
    return widen(load_eight_halves(at, count), load_eight_halves(at + 8, count - 8));
}

inline float fold(Floats lanes) {
    const float32x4_t four =
        vaddq_f32(vaddq_f32(lanes.part[0], lanes.part[2]), vaddq_f32(lanes.part[1], lanes.part[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

inline int8x16_t as_signed(uint8x16_t codes) { return vreinterpretq_s8_u8(codes); }
inline int8x16_t less_128(uint8x16_t codes) { return as_signed(veorq_u8(codes, vdupq_n_u8(0x80))); }

constexpr int kDotRows = 2, kDotVectors = 2, kAddVectors = 2, kAddFloats = 2;
constexpr int kRowTokens = 4, kChains = 2;

inline Ints zero_ints() {
    return parts<Ints>([](int) { return vdupq_n_s32(0); });
}
inline Ints add(Ints x, Ints y) {
    return parts<Ints>([&](int p) { return vaddq_s32(x.part[p], y.part[p]); });
}

template <Mode mode, int n>
inline Ints add_products(Ints sums, const Codes codes[n], const int8_t* x) {
    return parts<Ints>([&](int p) {
        int32x4_t own_sums = sums.part[p], x_sums = vdupq_n_s32(0);
#if !defined(__ARM_FEATURE_DOTPROD)
        int16x8_t first = vdupq_n_s16(0), second = first;  // they hold four products of 4-bit codes, one of 8-bit codes
#endif
#pragma GCC unroll 4
        for (int v = 0; v < n; ++v) {
            const int8x16_t own = vld1q_s8(x + v * kGroup + 16 * p);
            const int8x16_t w = mode == Mode::kInt8 ? less_128(codes[v].part[p]) : as_signed(codes[v].part[p]);
#if defined(__ARM_FEATURE_DOTPROD)
            own_sums = vdotq_s32(own_sums, w, own);
            if constexpr (mode == Mode::kInt8) x_sums = vdotq_s32(x_sums, vdupq_n_s8(1), own);
#else
            first = vmlal_s8(first, vget_low_s8(w), vget_low_s8(own));
            second = vmlal_high_s8(second, w, own);
            if constexpr (mode == Mode::kInt8) {
                own_sums = vaddq_s32(own_sums, vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(second)));
                first = second = vdupq_n_s16(0);
                x_sums = vpadalq_s16(x_sums, vpaddlq_s8(own));
            }
#endif
        }
        if constexpr (mode == Mode::kInt8) return vaddq_s32(own_sums, vshlq_n_s32(x_sums, 7));
#if !defined(__ARM_FEATURE_DOTPROD)
        own_sums = vaddq_s32(own_sums, vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(second)));
#endif
        return own_sums;
    });
}

template <int n>
inline Ints spread(Ints x) {
    int32x4_t low = vaddq_s32(x.part[0], x.part[2]), high = vaddq_s32(x.part[1], x.part[3]);
    if constexpr (n < 8) low = high = vaddq_s32(low, high);
    if constexpr (n < 4) low = high = vaddq_s32(low, vextq_s32(low, low, 2));
    if constexpr (n < 2) low = high = vaddq_s32(low, vrev64q_s32(low));
    return {{low, high, low, high}};
}

inline Ints from_lane(int at, Ints x, Ints y) {
    return parts<Ints>([&](int p) {
        return vbslq_s32(vreinterpretq_u32_s32(vld1q_s32(kFromLane + kLanes - at + 4 * p)), y.part[p], x.part[p]);
    });
}

#if defined(FATE_BAND_KERNEL)

constexpr int kBandVectors = 1, kBandTokens = 4;
constexpr int kBandsInt4 = 8, kBandsInt2 = 8, kBandsInt8 = 8;

// Squares of 4 times 4 words.
inline void transpose(Codes rows[kLanes]) {
    Codes columns[kLanes];
    for (int q = 0; q < 4; ++q) {  // rows 4q..4q+3
        for (int p = 0; p < 4; ++p) {
            const auto part = [&](int r) { return vreinterpretq_u32_u8(rows[4 * q + r].part[p]); };
            const uint32x4x2_t pair01 = vtrnq_u32(part(0), part(1)), pair23 = vtrnq_u32(part(2), part(3));
            for (int i = 0; i < 2; ++i) {
                const uint32x4_t x = pair01.val[i], y = pair23.val[i];
                columns[4 * p + i].part[q] = vreinterpretq_u8_u32(vcombine_u32(vget_low_u32(x), vget_low_u32(y)));
                columns[4 * p + 2 + i].part[q] = vreinterpretq_u8_u32(vcombine_u32(vget_high_u32(x), vget_high_u32(y)));
            }
        }
    }
    for (int c = 0; c < kLanes; ++c) rows[c] = columns[c];
}

template <Mode mode, int n>
inline void dot_band(const uint8_t* block, const uint8_t* next, Pairs pairs, const TokenRow* tokens, int64_t x,
                     Ints dots[n][kBandVectors]) {
    Ints sums[n];
    int32x4_t x_sums[n];
    const auto add_four = [&](const Codes& w, int four) {
#pragma GCC unroll 4
        for (int t = 0; t < n; ++t) {
            int32_t activations;
            std::memcpy(&activations, tokens[t].codes + x + 4 * four, 4);
            const int8x16_t own = vreinterpretq_s8_s32(vdupq_n_s32(activations));
            sums[t] = parts<Ints>([&](int p) { return vdotq_s32(sums[t].part[p], as_signed(w.part[p]), own); });
            if constexpr (mode == Mode::kInt8) x_sums[t] = vdotq_s32(x_sums[t], vdupq_n_s8(1), own);
        }
    };
#pragma GCC unroll 4
    for (int t = 0; t < n; ++t) {
        sums[t] = zero_ints();
        x_sums[t] = vdupq_n_s32(0);
    }
    for (int i = 0; i < (mode == Mode::kInt8 ? 16 : 8); ++i) {
        prefetch(next + i * 64);
        const Codes codes = load_codes(block + i * 64);
        if constexpr (mode == Mode::kInt8) {
            add_four(parts<Codes>([&](int p) { return vreinterpretq_u8_s8(less_128(codes.part[p])); }), i);
        } else {
            add_four(both(codes, fill(0x0f)), pairs.lower(i));
            add_four(shift_right<4>(codes), pairs.upper(i));
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < n; ++t) {
        dots[t][0] = sums[t];
        if constexpr (mode == Mode::kInt8) {
            const int32x4_t more = vshlq_n_s32(x_sums[t], 7);
            dots[t][0] = parts<Ints>([&](int p) { return vaddq_s32(sums[t].part[p], more); });
        }
    }
}

#endif

}  // namespace
}  // namespace fate
