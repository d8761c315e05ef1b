// Matrices of few rows, as gates are, times few tokens: near enough to the model's own arithmetic, and cheap.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "numeric.h"

namespace fate {

// The `limit` likeliest of softmax(weights [experts, hidden] x [hidden]), with their probabilities, likeliest first.
// Weights and x are of `dtype`.
std::vector<std::pair<int, float>> rank_experts(const void* weights, const void* x, DType dtype, int experts,
                                                int hidden, int limit);

// x [tokens, cols] times weights [rows, cols] -> out [tokens, rows]; all of `dtype`, summed in float32.
void multiply_few_rows(const void* weights, const void* x, DType dtype, int rows, int cols, int64_t tokens, void* out);

// A softmax router's answer for one token: logits [experts] = weights x, rounded to `dtype`, the `top_k` largest of
// their softmax, largest first (of equals the lower index), divided by their sum if `normalize`.
struct Choice {
    void* logits;       // [experts], of `dtype`
    void* scores;       // [top_k]
    DType score_dtype;
    int64_t* indices;   // [top_k]
    int top_k;
    bool normalize;
};
void route(const void* weights, const void* x, DType dtype, int experts, int hidden, const Choice& choice,
           int threads);

}  // namespace fate
