// Routers: matrices of few rows, times any number of tokens, and the choice of experts from what they give.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "numeric.h"

namespace fate {

using Ranked = std::vector<std::pair<int, float>>;

// Of each of `tokens` rows of x [tokens, hidden]: the `limit` likeliest of softmax(weights [experts, hidden] x), with
// their probabilities, likeliest first, of equals the lower index. Weights and x are of `dtype`.
std::vector<Ranked> rank_experts(const void* weights, const void* x, DType dtype, int experts, int hidden,
                                 int64_t tokens, int limit, int threads);

// x [tokens, cols] times weights [rows, cols] -> out [tokens, rows]; all of `dtype`, summed in float32. A token's sums
// are added in one order, however many tokens and threads there are.
void multiply_few_rows(const void* weights, const void* x, DType dtype, int rows, int cols, int64_t tokens, void* out,
                       int threads);

// A softmax router's answer for `tokens` tokens: logits = weights x, rounded to `dtype`; the `top_k` largest of their
// softmax, largest first, of equals the lower index, divided by their sum if `renormalize`.
struct Choice {
    void* logits;      // [tokens, experts], of `dtype`
    void* scores;      // [tokens, top_k]
    DType score_dtype;
    int64_t* indices;  // [tokens, top_k]
    int top_k;
    bool renormalize;
};
void route(const void* weights, const void* x, DType dtype, int experts, int hidden, int64_t tokens,
           const Choice& choice, int threads);

}  // namespace fate
