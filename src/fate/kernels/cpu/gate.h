// Matrices of few rows, as routers are, times tokens: near enough to the model's own arithmetic, and cheap.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "numeric.h"

namespace fate {

// x [tokens, cols] times weights [rows, cols] -> out [tokens, rows]; all of `dtype`, summed in float32.
void multiply_few_rows(const void* weights, const void* x, DType dtype, int rows, int cols, int64_t tokens, void* out,
                       int threads);

// For each token of x [tokens, hidden] the `limit` likeliest of softmax(weights [experts, hidden] x), with their
// probabilities, likeliest first. Weights and x are of `dtype`.
std::vector<std::vector<std::pair<int, float>>> rank_experts(const void* weights, const void* x, DType dtype,
                                                             int experts, int hidden, int64_t tokens, int limit,
                                                             int threads);

// A softmax router's weights [experts, hidden], of the activations' dtype, and what it does with its probabilities.
struct Router {
    const void* weights;
    int experts, hidden, top_k;
    bool renormalize;  // the top_k probabilities are divided by their sum
    DType score_dtype;
};

// A router's answer for some tokens: logits weights x, rounded to `dtype`; the top_k largest of their softmax, largest
// first (of equals the lower index), and whose they are.
struct Choice {
    void* logits;      // [tokens, experts], of `dtype`
    void* scores;      // [tokens, top_k], of score_dtype
    int64_t* indices;  // [tokens, top_k]
};
void route(const Router& router, const void* x, DType dtype, int64_t tokens, const Choice& choice, int threads);

// Bytes of scratch of these functions for `tokens` tokens: of the products, and of what is made of them.
int64_t gate_scratch_bytes(int hidden, int64_t tokens, int threads);
int64_t choice_scratch_bytes(int experts, int64_t tokens, int threads);

}  // namespace fate
