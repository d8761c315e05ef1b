// Activations as the tile kernels read them: int8, symmetric, one scale per group of 64 columns (absmax / 127).
//
// One token is its codes twice, in the order of the columns and in that of a packed row (see layout.h), [groups * 64]
// each, and scales and sums [padded_groups]; `sums` holds scale * sum(codes), what a group's offset is multiplied by.
#pragma once

#include <cstdint>

#include "layout.h"
#include "numeric.h"

namespace fate {

static inline int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

// Scales and sums are padded with zeros to whole vectors.
static inline int padded_groups(int groups) { return round_up(groups, kLanes); }

struct TokenRow {
    const int8_t* codes;
    const int8_t* packed;  // the same, in the order of a packed row
    const float* scales;
    const float* sums;
};

// Bytes from one token's codes to the next's: an odd number of cache lines, so that tokens do not share L1 sets.
static inline int64_t codes_pitch(int groups) { return static_cast<int64_t>(groups | 1) * kGroup; }

// Quantized tokens, contiguous.
struct TokenRows {
    int8_t* codes;
    int8_t* packed;
    float* scales;
    float* sums;
    int groups;

    static int64_t bytes(int64_t count, int groups) {
        return count * (2 * codes_pitch(groups) + 8 * padded_groups(groups));
    }
    TokenRow row(int64_t token) const {
        return {codes_of(token), packed_of(token), scales_of(token), sums_of(token)};
    }
    int8_t* codes_of(int64_t token) const { return codes + token * codes_pitch(groups); }
    int8_t* packed_of(int64_t token) const { return packed + token * codes_pitch(groups); }
    float* scales_of(int64_t token) const { return scales + token * padded_groups(groups); }
    float* sums_of(int64_t token) const { return sums + token * padded_groups(groups); }
};

// float32 values [cols] -> row `token` of `out`.
void quantize_row(const float* values, int cols, const TokenRows& out, int64_t token);

// float32 values [cols] -> rows 2 * token, as above, and 2 * token + 1, what rounding left of the values in steps kFiner
// times as small. The products of both rows add up to one of 15-bit activations.
constexpr float kFiner = 254.0f;
void quantize_row_twice(const float* values, int cols, const TokenRows& out, int64_t token);

// `count` consecutive elements of `dtype` <-> float32.
void load_floats(const void* source, DType dtype, int64_t count, float* out);
void store_floats(const float* values, int64_t count, DType dtype, void* out);

}  // namespace fate
