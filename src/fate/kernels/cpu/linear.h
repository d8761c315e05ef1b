// Products of packed matrices with activations.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "expert_activation.h"
#include "layout.h"
#include "numeric.h"

namespace fate {

// A matrix, its bias [rows] if not null, and what it gives, [tokens, rows].
struct Product {
    Matrix matrix;
    const void* bias;
    void* out;
};

// x [tokens, cols] times each matrix, plus its bias -> its out; all of `dtype`, contiguous. All matrices take x, which is
// quantized once, and are shared out over the threads together.
void linear(std::initializer_list<Product> products, const void* x, DType dtype, int64_t tokens, int threads);

// Bytes of scratch of products of `tokens` tokens of `cols` columns.
int64_t linear_scratch_bytes(int cols, int64_t tokens, int threads);

// One expert of a call: its record, read to INT2 depth if prefix_only, and its (token, rank) pairs.
struct ExpertWork {
    const uint8_t* record;
    bool prefix_only;
    int64_t first_pair, pairs;
    int64_t number = 0;  // its row of the biases
};

struct ExpertsCall {
    const Record* record;  // matrices: gate_up [2I, H] (up [I, H] where nothing gates), down [H, I]
    const void* x;         // [tokens, H]
    DType dtype;
    int64_t tokens;
    const int32_t* pairs;  // [pairs, 2] = (token, rank)
    float* rows;           // [tokens, top_k, H]
    int64_t top_k;
    int threads;
    ExpertActivation activation = {};
    const void* up_bias = nullptr;    // [experts, rows of the first matrix] of bias_dtype, in the order of its rows
    const void* down_bias = nullptr;  // [experts, H]; both or none
    DType bias_dtype = DType::kFloat32;
};

// rows[token, rank] = down(activation(gate_up(x))) for every pair of every expert.
void experts(const ExpertsCall& call, const ExpertWork* work, int count);

// Bytes of scratch of a call of `tokens` tokens whose experts are such records, of at least 512 pairs.
int64_t experts_scratch_bytes(const Record& record, int64_t tokens, int threads);

}  // namespace fate
