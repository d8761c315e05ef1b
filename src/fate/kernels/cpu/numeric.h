// Scalar conversions, written without branches where loops over them should vectorise. Built with -ffp-contract=off:
// an element gives the same bits whether its loop was vectorised or not.
#pragma once

#include <bit>
#include <cstdint>

// Loops marked FATE_CLONES are compiled per instruction set and resolved when the library is loaded, which is before
// ThreadSanitizer can run anything.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_THREAD__)
#define FATE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FATE_CLONES
#endif

namespace fate {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

static inline int item_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

static inline float half_to_float(uint16_t half) {
    // Scaling by 2^112 renormalises: exponent bias 127 - 15, subnormals included; inf and NaN need the exponent's rest.
    const uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13;
    const float scaled = std::bit_cast<float>(bits) * 0x1p112f;
    const uint32_t special = bits >= 0x0f800000u ? 0x7f800000u : 0u;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | static_cast<uint32_t>(half & 0x8000) << 16);
}

static inline uint16_t float_to_half(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t sign = bits >> 16 & 0x8000u;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or beyond
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds to a multiple of 2^-24
        const float sum = std::bit_cast<float>(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(sum) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | rounded >> 13);
}

static inline float bfloat16_to_float(uint16_t value) {
    return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

static inline uint16_t float_to_bfloat16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded >> 16);
}

// Nearest integer, ties to even, for |value| < 2^22, without the instruction that SSE2 lacks.
static inline float round_even(float value) { return (value + 0x1.8p23f) - 0x1.8p23f; }

// x * y + z, rounded once. Where no instruction does it: the product is exact in double, its sum with z is made odd if
// it is not exact, and then rounding it again gives what rounding once would have given.
static inline float fused_multiply_add(float x, float y, float z) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(x, y, z);
#else
    const double product = static_cast<double>(x) * y, sum = product + z;
    const double of_z = sum - product, error = (product - (sum - of_z)) + (z - of_z);
    uint64_t bits = std::bit_cast<uint64_t>(sum);
    const bool inexact = error > 0.0 || error < 0.0;  // false for what an infinity leaves
    if (inexact && (bits & 1) == 0) bits += (error > 0.0) == (sum > 0.0) ? 1 : -1;
    return static_cast<float>(std::bit_cast<double>(bits));
#endif
}

// 2^octaves, for octaves held within [-126, 126], by a degree-6 polynomial on [-0.5, 0.5]: relative error below 2e-7.
__attribute__((always_inline)) static inline float exp2_clamped(float octaves) {
    octaves = octaves > 126.0f ? 126.0f : octaves;
    octaves = octaves < -126.0f ? -126.0f : octaves;
    const float whole = round_even(octaves);
    const float f = octaves - whole;
    float power = 1.54035304e-4f;
    power = power * f + 1.33335581e-3f;
    power = power * f + 9.61812911e-3f;
    power = power * f + 5.55041087e-2f;
    power = power * f + 2.40226507e-1f;
    power = power * f + 6.93147181e-1f;
    power = power * f + 1.0f;
    const uint32_t exponent = std::bit_cast<uint32_t>(whole + 0x1.8p23f) << 23;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(power) + exponent);
}

constexpr float kLog2E = 1.44269504f;

// x * sigmoid(alpha * x), `rate` being -alpha / ln 2.
__attribute__((always_inline)) static inline float silu(float x, float rate = -kLog2E) {
    return x / (1.0f + exp2_clamped(x * rate));
}

}  // namespace fate
