#include "gate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "activations.h"

namespace fate {

namespace {

constexpr int kLanes = 16;

template <typename T, float (*Float)(T)>
inline float dot(const T* weights, const float* x, int n) {
    float lanes[kLanes] = {};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += Float(weights[i + lane]) * x[i + lane];
    }
    float sum = std::accumulate(lanes, lanes + kLanes, 0.0f);
    for (; i < n; ++i) sum += Float(weights[i]) * x[i];
    return sum;
}

inline float same(float value) { return value; }

template <typename T, float (*Float)(T)>
inline void products(const void* weights, const void* x, int experts, int hidden, float* input, float* logits) {
    for (int i = 0; i < hidden; ++i) input[i] = Float(static_cast<const T*>(x)[i]);
    for (int e = 0; e < experts; ++e) {
        logits[e] = dot<T, Float>(static_cast<const T*>(weights) + static_cast<int64_t>(e) * hidden, input, hidden);
    }
}

FATE_CLONES void compute_logits(const void* weights, const void* x, DType dtype, int experts, int hidden, float* input,
                                float* logits) {
    switch (dtype) {
        case DType::kFloat32:
            return products<float, same>(weights, x, experts, hidden, input, logits);
        case DType::kBFloat16:
            return products<uint16_t, bfloat16_to_float>(weights, x, experts, hidden, input, logits);
        case DType::kFloat16:
            return products<uint16_t, half_to_float>(weights, x, experts, hidden, input, logits);
    }
}

}  // namespace

std::vector<std::pair<int, float>> rank_experts(const void* weights, const void* x, DType dtype, int experts,
                                                int hidden, int limit) {
    std::vector<float> input(hidden), logits(experts);
    compute_logits(weights, x, dtype, experts, hidden, input.data(), logits.data());
    std::vector<int> order(experts);
    std::iota(order.begin(), order.end(), 0);
    limit = std::min(limit, experts);
    std::partial_sort(order.begin(), order.begin() + limit, order.end(), [&](int a, int b) {
        return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    });
    const float top = logits[order[0]];
    float total = 0;
    for (const float logit : logits) total += std::exp(logit - top);
    std::vector<std::pair<int, float>> ranked(limit);
    for (int i = 0; i < limit; ++i) ranked[i] = {order[i], std::exp(logits[order[i]] - top) / total};
    return ranked;
}

void multiply_few_rows(const void* weights, const void* x, DType dtype, int rows, int cols, int64_t tokens, void* out) {
    std::vector<float> input(cols), products(rows);
    const int64_t item = item_bytes(dtype);
    for (int64_t t = 0; t < tokens; ++t) {
        compute_logits(weights, static_cast<const char*>(x) + t * cols * item, dtype, rows, cols, input.data(),
                       products.data());
        store_floats(products.data(), rows, dtype, static_cast<char*>(out) + t * rows * item);
    }
}

void route(const void* weights, const void* x, DType dtype, int experts, int hidden, const Choice& choice) {
    std::vector<float> input(hidden), logits(experts), scores(choice.top_k);
    compute_logits(weights, x, dtype, experts, hidden, input.data(), logits.data());
    store_floats(logits.data(), experts, dtype, choice.logits);
    load_floats(choice.logits, dtype, experts, logits.data());
    std::vector<int> order(experts);
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + choice.top_k, order.end(), [&](int a, int b) {
        return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    });
    float total = 0.0f, chosen = 0.0f;
    for (float logit : logits) total += std::exp(logit - logits[order[0]]);
    for (int rank = 0; rank < choice.top_k; ++rank) {
        choice.indices[rank] = order[rank];
        chosen += scores[rank] = std::exp(logits[order[rank]] - logits[order[0]]) / total;
    }
    if (choice.normalize)
        for (float& score : scores) score /= chosen;
    store_floats(scores.data(), choice.top_k, choice.score_dtype, choice.scores);
}

}  // namespace fate
