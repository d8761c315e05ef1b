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

// The same -> float32; takes scratch of kernels only.
void multiply_to_floats(const void* weights, const void* x, DType dtype, int rows, int cols, int64_t tokens, float* out,
                        int threads);

// For each token of x [tokens, hidden] the `limit` likeliest of softmax(weights [experts, hidden] x), with their
// probabilities, likeliest first. Weights and x are of `dtype`.
std::vector<std::vector<std::pair<int, float>>> rank_experts(const void* weights, const void* x, DType dtype,
                                                             int experts, int hidden, int64_t tokens, int limit,
                                                             int threads);

// What a router's scores are of its logits.
enum class Scoring {
    kSoftmax,       // their softmax
    kSigmoid,       // the sigmoid of each
    kSoftmaxOfTop,  // the softmax of the top_k largest
};

// A router's weights [experts, hidden], of the activations' dtype, and how it chooses by its scores.
struct Router {
    const void* weights;
    int experts, hidden, top_k;
    bool renormalize;  // the top_k scores are divided by their sum
    DType score_dtype;
    Scoring scoring = Scoring::kSoftmax;
    bool float_logits = false;          // logits are not rounded to the activations' dtype
    const void* bias = nullptr;         // [experts] of the activations' dtype, added to the logits, or null
    const float* correction = nullptr;  // [experts], added to the scores to choose by, but not to what counts, or null
    // Experts are chosen within the best top_groups of groups of neighbours; a group is as good as its group_best best.
    int groups = 1, top_groups = 1, group_best = 1;
    float scaling = 1.0f;  // of the scores that were chosen

    bool is_plain() const {
        return scoring == Scoring::kSoftmax && correction == nullptr && top_groups == groups && scaling == 1.0f;
    }
};

// A router's answer for some tokens: logits weights x + bias, rounded to `dtype`; the scores of the top_k chosen, the
// best choice first (of equals the lower index), and whose they are.
struct Choice {
    void* logits;      // [tokens, experts], of `dtype`, or float32 where the router does not round them
    void* scores;      // [tokens, top_k], of score_dtype
    int64_t* indices;  // [tokens, top_k]
};
void route(const Router& router, const void* x, DType dtype, int64_t tokens, const Choice& choice, int threads);

// Bytes of scratch of these functions for `tokens` tokens: of the products, and of what is made of them.
int64_t gate_scratch_bytes(int hidden, int64_t tokens, int threads);
int64_t choice_scratch_bytes(int experts, int64_t tokens, int threads);

}  // namespace fate
