#include "gate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tokens.h"

namespace fate {

namespace {

constexpr int kRows = 4, kItemRows = 8;
constexpr int64_t kMinShared = 1 << 15;  // weights that are worth a helper: a gate's are read from memory

// `count` rows at once, so that sums do not wait for one another.
template <typename T, float (*Float)(T), int count>
inline void dot(const T* weights, const float* x, int n, float* out) {
    float lanes[count][kLanes] = {};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int r = 0; r < count; ++r) {
            const T* row = weights + static_cast<int64_t>(r) * n + i;
            for (int lane = 0; lane < kLanes; ++lane) lanes[r][lane] += Float(row[lane]) * x[i + lane];
        }
    }
    for (int r = 0; r < count; ++r) {
        float sum = std::accumulate(lanes[r], lanes[r] + kLanes, 0.0f);
        for (int at = i; at < n; ++at) sum += Float(weights[static_cast<int64_t>(r) * n + at]) * x[at];
        out[r] = sum;
    }
}

inline float same(float value) { return value; }

template <typename T, float (*Float)(T)>
inline void products(const void* weights, const float* x, int rows, int cols, float* out) {
    const T* row = static_cast<const T*>(weights);
    int r = 0;
    for (; r + kRows <= rows; r += kRows, row += static_cast<int64_t>(kRows) * cols) {
        dot<T, Float, kRows>(row, x, cols, out + r);
    }
    for (; r < rows; ++r, row += cols) dot<T, Float, 1>(row, x, cols, out + r);
}

FATE_CLONES void multiply_rows(const void* weights, const float* x, DType dtype, int rows, int cols, float* out) {
    switch (dtype) {
        case DType::kFloat32:
            return products<float, same>(weights, x, rows, cols, out);
        case DType::kBFloat16:
            return products<uint16_t, bfloat16_to_float>(weights, x, rows, cols, out);
        case DType::kFloat16:
            return products<uint16_t, half_to_float>(weights, x, rows, cols, out);
    }
}

// weights [rows, cols] times x [cols], both of `dtype` -> out, summed in float32. `input`: scratch [cols].
void multiply(const void* weights, const void* x, DType dtype, int rows, int cols, float* input, float* out,
              int threads = 1) {
    load_floats(x, dtype, cols, input);
    const int items = (rows + kItemRows - 1) / kItemRows;
    parallel_for(items, static_cast<int64_t>(rows) * cols < kMinShared ? 1 : threads, [&](int64_t item, int) {
        const int first = static_cast<int>(item) * kItemRows;
        const char* own = static_cast<const char*>(weights) + static_cast<int64_t>(first) * cols * item_bytes(dtype);
        multiply_rows(own, input, dtype, std::min(kItemRows, rows - first), cols, out + first);
    });
}

}  // namespace

std::vector<std::pair<int, float>> rank_experts(const void* weights, const void* x, DType dtype, int experts,
                                                int hidden, int limit) {
    std::vector<float> input(hidden), logits(experts);
    multiply(weights, x, dtype, experts, hidden, input.data(), logits.data());
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
        multiply(weights, static_cast<const char*>(x) + t * cols * item, dtype, rows, cols, input.data(),
                 products.data());
        store_floats(products.data(), rows, dtype, static_cast<char*>(out) + t * rows * item);
    }
}

void route(const void* weights, const void* x, DType dtype, int experts, int hidden, const Choice& choice,
           int threads) {
    std::vector<float> input(hidden), logits(experts), scores(choice.top_k);
    multiply(weights, x, dtype, experts, hidden, input.data(), logits.data(), threads);
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
