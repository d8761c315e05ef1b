#include "activations.h"

#include <algorithm>
#include <cstring>

namespace fate {

namespace {

constexpr float kSmallest = 1e-30f;  // below it 127 / absmax would overflow; such a group counts as zero

// Bit patterns of |value| order like the values, with inf and then NaN on top: a bad input shows in the scale.
inline float absmax(const float* values) {
    uint32_t most = 0;
    for (int i = 0; i < kGroup; ++i) {
        const uint32_t bits = std::bit_cast<uint32_t>(values[i]) & 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    return std::bit_cast<float>(most);
}

inline void quantize_group(const float* values, int8_t* codes, float* scale, float* sum) {
    const float most = absmax(values);
    const float inverse = most < kSmallest ? 0.0f : 127.0f / most;
    int32_t total = 0;
    for (int i = 0; i < kGroup; ++i) {
        const int32_t code = std::bit_cast<int32_t>(values[i] * inverse + 0x1.8p23f) - 0x4b400000;
        codes[i] = static_cast<int8_t>(code);
        total += static_cast<int8_t>(code);
    }
    *scale = most < kSmallest ? 0.0f : most / 127.0f;
    *sum = *scale * static_cast<float>(total);
}

}  // namespace

FATE_CLONES
static void quantize_codes(const float* values, int cols, const TokenRows& out, int64_t token) {
    int8_t* codes = out.codes_of(token);
    float *scales = out.scales_of(token), *sums = out.sums_of(token);
    const int whole = cols / kGroup;
    for (int g = 0; g < whole; ++g) {
        quantize_group(values + g * kGroup, codes + g * kGroup, scales + g, sums + g);
    }
    if (whole < out.groups) {
        float last[kGroup] = {};
        std::memcpy(last, values + whole * kGroup, (cols - whole * kGroup) * sizeof(float));
        quantize_group(last, codes + whole * kGroup, scales + whole, sums + whole);
    }
    for (int g = out.groups; g < padded_groups(out.groups); ++g) scales[g] = sums[g] = 0.0f;
}

void quantize_row(const float* values, int cols, const TokenRows& out, int64_t token) {
    quantize_codes(values, cols, out, token);
    order_as_packed(out.codes_of(token), out.groups, out.packed_of(token));
}

// What a group's codes leave of its values, in int8 again.
FATE_CLONES
static void quantize_rest(const float* values, const int8_t* codes, float scale, int8_t* out, float* out_scale,
                          float* out_sum) {
    const float fine = scale / kFiner;
    const float inverse = fine > 0.0f ? 1.0f / fine : 0.0f;
    int sum = 0;
    for (int i = 0; i < kGroup; ++i) {
        const float rest = round_even((values[i] - static_cast<float>(codes[i]) * scale) * inverse);
        const int code = static_cast<int>(rest > 127.0f ? 127.0f : rest < -127.0f ? -127.0f : rest);
        out[i] = static_cast<int8_t>(code);
        sum += code;
    }
    *out_scale = fine;
    *out_sum = fine * static_cast<float>(sum);
}

void quantize_row_twice(const float* values, int cols, const TokenRows& out, int64_t token) {
    const int64_t coarse = 2 * token, rest = coarse + 1;
    quantize_row(values, cols, out, coarse);
    for (int g = 0; g < out.groups; ++g) {
        float group[kGroup] = {};
        std::memcpy(group, values + g * kGroup, std::min(kGroup, cols - g * kGroup) * sizeof(float));
        quantize_rest(group, out.codes_of(coarse) + g * kGroup, out.scales_of(coarse)[g],
                      out.codes_of(rest) + g * kGroup, out.scales_of(rest) + g, out.sums_of(rest) + g);
    }
    for (int g = out.groups; g < padded_groups(out.groups); ++g) out.scales_of(rest)[g] = out.sums_of(rest)[g] = 0.0f;
    order_as_packed(out.codes_of(rest), out.groups, out.packed_of(rest));
}

FATE_CLONES
void load_floats(const void* source, DType dtype, int64_t count, float* out) {
    const uint16_t* halves = static_cast<const uint16_t*>(source);
    if (dtype == DType::kFloat32) {
        std::memcpy(out, source, count * sizeof(float));
    } else if (dtype == DType::kBFloat16) {
        for (int64_t i = 0; i < count; ++i) out[i] = bfloat16_to_float(halves[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(halves[i]);
    }
}

FATE_CLONES
void store_floats(const float* values, int64_t count, DType dtype, void* out) {
    uint16_t* halves = static_cast<uint16_t*>(out);
    if (dtype == DType::kFloat32) {
        std::memcpy(out, values, count * sizeof(float));
    } else if (dtype == DType::kBFloat16) {
        for (int64_t i = 0; i < count; ++i) halves[i] = float_to_bfloat16(values[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) halves[i] = float_to_half(values[i]);
    }
}

}  // namespace fate
