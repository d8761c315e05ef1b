// Products of packed matrices with activations.
#pragma once

#include <cstdint>

#include "layout.h"
#include "numeric.h"

namespace fate {

// x [tokens, cols] times the matrix, plus bias [rows] if not null -> out [tokens, rows]; all of `dtype`, contiguous.
void linear(const Matrix& matrix, const void* x, DType dtype, int64_t tokens, const void* bias, void* out, int threads);

// One expert of a call: its record, read to INT2 depth if prefix_only, and its (token, rank) pairs.
struct ExpertWork {
    const uint8_t* record;
    bool prefix_only;
    int64_t first_pair, pairs;
};

struct ExpertsCall {
    const Record* record;  // matrices: gate_up [2I, H] (gate rows, then up rows), down [H, I]
    const void* x;         // [tokens, H]
    DType dtype;
    int64_t tokens;
    const int32_t* pairs;  // [pairs, 2] = (token, rank)
    float* rows;           // [tokens, top_k, H]
    int64_t top_k;
    int threads;
};

// rows[token, rank] = down(silu(gate(x)) * up(x)) for every pair of every expert.
void experts_swiglu(const ExpertsCall& call, const ExpertWork* experts, int count);

}  // namespace fate
