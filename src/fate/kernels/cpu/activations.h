// Activations as the tile kernels read them: int8, symmetric, one scale per group of 64 columns (absmax / 127).
//
// Two forms, the same numbers in each:
//   rows     one token: codes [groups * 64], scales and sums [padded_groups]
//   blocks   16 tokens interleaved so that a vector lane is a token:
//            codes [groups * 16][16 tokens][4 columns], scales and sums [groups][16 tokens]
// `sums` holds scale * sum(codes), what a group's offset is multiplied by.
#pragma once

#include <cstdint>

#include "layout.h"
#include "numeric.h"

namespace fate {

constexpr int kBlockTokens = 16;

static inline int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

// Row form pads scales and sums with zeros to whole vectors.
static inline int padded_groups(int groups) { return round_up(groups, kLanes); }

struct TokenRow {
    const int8_t* codes;
    const float* scales;
    const float* sums;
};

// `count` quantized tokens in row form, contiguous.
struct TokenRows {
    int8_t* codes;
    float* scales;
    float* sums;
    int groups;

    static int64_t bytes(int64_t count, int groups) {
        return count * (static_cast<int64_t>(groups) * kGroup + 8 * padded_groups(groups));
    }
    TokenRow row(int64_t token) const {
        return {codes + token * groups * kGroup, scales + token * padded_groups(groups),
                sums + token * padded_groups(groups)};
    }
};

// Blocks of 16 tokens, contiguous; lanes beyond the last token hold zeros.
struct TokenBlocks {
    int8_t* codes;
    float* scales;
    float* sums;
    int groups;

    static int64_t bytes(int64_t blocks, int groups) {
        return blocks * kBlockTokens * (static_cast<int64_t>(groups) * kGroup + 8 * groups);
    }
    int8_t* block_codes(int64_t block) const { return codes + block * groups * kGroup * kBlockTokens; }
    float* block_scales(int64_t block) const { return scales + block * groups * kBlockTokens; }
    float* block_sums(int64_t block) const { return sums + block * groups * kBlockTokens; }
};

// float32 values [cols] -> row `token` of `out`.
void quantize_row(const float* values, int cols, const TokenRows& out, int64_t token);

// float32 values [cols] -> rows 2 * token, as above, and 2 * token + 1, what rounding left of the values in steps kFiner
// times as small. The products of both rows add up to one of 15-bit activations.
constexpr float kFiner = 254.0f;
void quantize_row_twice(const float* values, int cols, const TokenRows& out, int64_t token);

// Up to 16 rows -> block `block` of `out`.
void interleave(const TokenRow* rows, int count, const TokenBlocks& out, int64_t block);

// `count` consecutive elements of `dtype` <-> float32.
void load_floats(const void* source, DType dtype, int64_t count, float* out);
void store_floats(const float* values, int64_t count, DType dtype, void* out);

}  // namespace fate
