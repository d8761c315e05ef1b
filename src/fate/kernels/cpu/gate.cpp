#include "gate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "dispatch.h"
#include "ops.h"
#include "tokens.h"

namespace fate {

namespace {

constexpr int kSumLanes = 16;
constexpr int kRows = 4;           // multiplied at once, so that sums do not wait for one another
constexpr int kItemRows = 8;       // of one thread's item
constexpr int64_t kTokenBlock = 32;  // tokens held as floats at a time
constexpr int64_t kMinShared = 1 << 15;  // weights times tokens that are worth a helper

// `count` rows of weights times one token.
template <typename Type, int count>
__attribute__((always_inline)) inline void dot(const typename Type::Item* weights, const float* x, int n, float* out) {
    float lanes[count][kSumLanes] = {};
    int i = 0;
    for (; i + kSumLanes <= n; i += kSumLanes) {
        for (int r = 0; r < count; ++r) {
            const auto* row = weights + static_cast<int64_t>(r) * n + i;
            for (int lane = 0; lane < kSumLanes; ++lane) lanes[r][lane] += Type::to_float(row[lane]) * x[i + lane];
        }
    }
    for (int r = 0; r < count; ++r) {
        float sum = 0.0f;
        for (int lane = 0; lane < kSumLanes; ++lane) sum += lanes[r][lane];
        for (int at = i; at < n; ++at) sum += Type::to_float(weights[static_cast<int64_t>(r) * n + at]) * x[at];
        out[r] = sum;
    }
}

template <typename Type>
__attribute__((always_inline)) inline void products(const void* weights, const float* x, int rows, int cols,
                                                    float* out) {
    const auto* row = static_cast<const typename Type::Item*>(weights);
    int r = 0;
    for (; r + kRows <= rows; r += kRows, row += static_cast<int64_t>(kRows) * cols)
        dot<Type, kRows>(row, x, cols, out + r);
    for (; r < rows; ++r, row += cols) dot<Type, 1>(row, x, cols, out + r);
}

FATE_CLONES void multiply_rows(const void* weights, const float* x, DType dtype, int rows, int cols, float* out) {
    if (dtype == DType::kFloat32) products<Float32>(weights, x, rows, cols, out);
    else if (dtype == DType::kBFloat16) products<BFloat16>(weights, x, rows, cols, out);
    else products<Float16>(weights, x, rows, cols, out);
}

// Calls done(first token, tokens, floats [tokens, rows]) for one block of tokens after the other.
template <typename Done>
void multiply(const void* weights, const void* x, DType dtype, int rows, int cols, int64_t tokens, int threads,
              const Done& done) {
    const int64_t block = std::min(tokens, kTokenBlock);
    Scratch& scratch = Scratch::reserve(Scratch::rounded(block * cols * sizeof(float)) +
                                        Scratch::rounded(block * rows * sizeof(float)));
    float *input = scratch.take<float>(block * cols), *out = scratch.take<float>(block * rows);
    const int items = (rows + kItemRows - 1) / kItemRows;
    for (int64_t first = 0; first < tokens; first += block) {
        const int64_t count = std::min(block, tokens - first);
        load_floats(element(x, dtype, first * cols), dtype, count * cols, input);
        const int team = static_cast<int64_t>(rows) * cols * count < kMinShared ? 1 : threads;
        parallel_for(items, team, [&](int64_t item, int) {
            const int row = static_cast<int>(item) * kItemRows, some = std::min(kItemRows, rows - row);
            const void* own = element(weights, dtype, static_cast<int64_t>(row) * cols);
            for (int64_t t = 0; t < count; ++t) multiply_rows(own, input + t * cols, dtype, some, cols, out + t * rows + row);
        });
        done(first, count, out);
    }
}

// The `limit` largest, of equals the lower index.
void choose(const float* logits, int experts, int limit, int* order) {
    std::iota(order, order + experts, 0);
    std::partial_sort(order, order + limit, order + experts, [&](int a, int b) {
        return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    });
}

float sum_of_exponentials(const float* logits, int experts, float top) {
    float total = 0.0f;
    for (int e = 0; e < experts; ++e) total += std::exp(logits[e] - top);
    return total;
}

}  // namespace

std::vector<Ranked> rank_experts(const void* weights, const void* x, DType dtype, int experts, int hidden,
                                 int64_t tokens, int limit, int threads) {
    limit = std::min(limit, experts);
    std::vector<Ranked> ranked(tokens, Ranked(limit));
    std::vector<int> order(experts);
    multiply(weights, x, dtype, experts, hidden, tokens, threads, [&](int64_t first, int64_t count, const float* rows) {
        for (int64_t t = 0; t < count; ++t) {
            const float* logits = rows + t * experts;
            choose(logits, experts, limit, order.data());
            const float top = logits[order[0]], total = sum_of_exponentials(logits, experts, top);
            for (int i = 0; i < limit; ++i)
                ranked[first + t][i] = {order[i], std::exp(logits[order[i]] - top) / total};
        }
    });
    return ranked;
}

void multiply_few_rows(const void* weights, const void* x, DType dtype, int rows, int cols, int64_t tokens, void* out,
                       int threads) {
    multiply(weights, x, dtype, rows, cols, tokens, threads, [&](int64_t first, int64_t count, const float* products) {
        store_floats(products, count * rows, dtype, element(out, dtype, first * rows));
    });
}

void route(const void* weights, const void* x, DType dtype, int experts, int hidden, int64_t tokens,
           const Choice& choice, int threads) {
    const int top_k = choice.top_k;
    std::vector<int> order(experts);
    std::vector<float> logits(experts), scores(top_k);
    multiply(weights, x, dtype, experts, hidden, tokens, threads, [&](int64_t first, int64_t count, const float* rows) {
        for (int64_t t = 0; t < count; ++t) {
            const int64_t token = first + t;
            void* rounded = element(choice.logits, dtype, token * experts);
            store_floats(rows + t * experts, experts, dtype, rounded);
            load_floats(rounded, dtype, experts, logits.data());
            choose(logits.data(), experts, top_k, order.data());
            const float top = logits[order[0]], total = sum_of_exponentials(logits.data(), experts, top);
            float chosen = 0.0f;
            for (int rank = 0; rank < top_k; ++rank) {
                choice.indices[token * top_k + rank] = order[rank];
                chosen += scores[rank] = std::exp(logits[order[rank]] - top) / total;
            }
            if (choice.renormalize)
                for (float& score : scores) score /= chosen;
            store_floats(scores.data(), top_k, choice.score_dtype, element(choice.scores, choice.score_dtype, token * top_k));
        }
    });
}

}  // namespace fate
