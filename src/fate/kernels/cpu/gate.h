// Asking a gate of one token's activations, for prediction: near enough to the model's own arithmetic, and cheap.
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

}  // namespace fate
