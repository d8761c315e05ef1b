#include "gate.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "tokens.h"

namespace fate {

namespace {

constexpr int kItemRows = 8;
constexpr int64_t kFewTokens = 16;         // converted together, and all they are shared out by rows
constexpr int64_t kMaxTokens = 512;        // whose logits are kept at a time
constexpr int64_t kMinShared = 1 << 15;    // weights that are worth a helper: a router's are read from memory
constexpr int64_t kFewChoices = 1 << 10;   // logits chosen from sooner than a helper comes

const void* element(const void* base, DType dtype, int64_t index) {
    return static_cast<const char*>(base) + index * item_bytes(dtype);
}

void* element(void* base, DType dtype, int64_t index) { return static_cast<char*>(base) + index * item_bytes(dtype); }

// The `limit` largest of softmax(logits [count]) and whose they are, largest first, of equals the lower index.
// order: [count], of which the first `limit` are set.
void top_of_softmax(const float* logits, int count, int limit, int* order, float* probabilities) {
    std::iota(order, order + count, 0);
    std::partial_sort(order, order + limit, order + count, [&](int a, int b) {
        return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    });
    const float top = logits[order[0]];
    float total = 0.0f;
    for (int i = 0; i < count; ++i) total += std::exp(logits[i] - top);
    for (int i = 0; i < limit; ++i) probabilities[i] = std::exp(logits[order[i]] - top) / total;
}

// logits [count] -> their scores.
void score(Scoring scoring, float* logits, int count) {
    if (scoring == Scoring::kSigmoid) {
        for (int i = 0; i < count; ++i) logits[i] = 1.0f / (1.0f + std::exp(-logits[i]));
    } else if (scoring == Scoring::kSoftmax) {
        const float top = *std::max_element(logits, logits + count);
        float total = 0.0f;
        for (int i = 0; i < count; ++i) total += logits[i] = std::exp(logits[i] - top);
        for (int i = 0; i < count; ++i) logits[i] /= total;
    }
}

// What experts are not chosen by outside the best groups: -infinity. `by` [experts]; `best` [experts] is overwritten.
void keep_best_groups(const Router& router, float* by, float* best) {
    const int each = router.experts / router.groups, counted = std::min(router.group_best, each);
    std::vector<std::pair<float, int>> groups;
    for (int group = 0; group < router.groups; ++group) {
        std::copy_n(by + group * each, each, best);
        std::partial_sort(best, best + counted, best + each, std::greater<>());
        groups.emplace_back(-std::accumulate(best, best + counted, 0.0f), group);
    }
    std::sort(groups.begin(), groups.end());
    for (int place = router.top_groups; place < router.groups; ++place) {
        std::fill_n(by + groups[place].second * each, each, -std::numeric_limits<float>::infinity());
    }
}

// The top_k of one token's logits [experts], which are overwritten, and their scores. by, order: [experts].
void choose_scored(const Router& router, float* logits, float* by, int* order, float* scores) {
    const int experts = router.experts, top_k = router.top_k;
    score(router.scoring, logits, experts);
    if (router.top_groups < router.groups) {
        std::vector<float> best(experts);
        for (int i = 0; i < experts; ++i) by[i] = logits[i] + (router.correction != nullptr ? router.correction[i] : 0);
        keep_best_groups(router, by, best.data());
    } else {
        for (int i = 0; i < experts; ++i) by[i] = logits[i] + (router.correction != nullptr ? router.correction[i] : 0);
    }
    std::iota(order, order + experts, 0);
    std::partial_sort(order, order + top_k, order + experts,
                      [&](int a, int b) { return by[a] > by[b] || (by[a] == by[b] && a < b); });
    for (int rank = 0; rank < top_k; ++rank) scores[rank] = logits[order[rank]];
    if (router.scoring == Scoring::kSoftmaxOfTop) score(Scoring::kSoftmax, scores, top_k);
}

// What choosing among some tokens' logits takes.
struct ChoiceScratch {
    float* logits;         // [tokens, experts]
    int* order;            // [threads, experts]
    float* probabilities;  // [threads, limit]
    float* by;             // [threads, experts]
    int threads;

    ChoiceScratch(int64_t tokens, int experts, int limit, int most_threads)
        : threads(tokens * experts > kFewChoices ? most_threads : 1) {
        Scratch& scratch = Scratch::reserve(bytes(tokens, experts, limit, threads), Scratch::kCaller);
        logits = scratch.take<float>(tokens * experts);
        order = scratch.take<int>(threads * experts);
        probabilities = scratch.take<float>(threads * limit);
        by = scratch.take<float>(threads * experts);
    }

    static int64_t bytes(int64_t tokens, int experts, int limit, int threads) {
        return Scratch::bytes_of<float>(tokens * experts) + Scratch::bytes_of<int>(threads * experts) +
               Scratch::bytes_of<float>(threads * limit) + Scratch::bytes_of<float>(threads * experts);
    }
};

void route_some(const Router& router, const void* x, DType dtype, int64_t tokens, const Choice& choice, int threads) {
    const int experts = router.experts, top_k = router.top_k;
    const ChoiceScratch scratch(tokens, experts, top_k, threads);
    multiply_to_floats(router.weights, x, dtype, experts, router.hidden, tokens, scratch.logits, threads);
    if (router.bias != nullptr) {
        float* bias = scratch.by;  // as long as all threads' are not in use
        load_floats(router.bias, dtype, experts, bias);
        for (int64_t at = 0; at < tokens * experts; ++at) scratch.logits[at] += bias[at % experts];
    }
    const DType given = router.float_logits ? DType::kFloat32 : dtype;
    store_floats(scratch.logits, tokens * experts, given, choice.logits);
    load_floats(choice.logits, given, tokens * experts, scratch.logits);
    parallel_for(tokens, scratch.threads, [&](int64_t token, int thread) {
        int* order = scratch.order + thread * experts;
        float* scores = scratch.probabilities + thread * top_k;
        float* logits = scratch.logits + token * experts;
        if (router.is_plain()) top_of_softmax(logits, experts, top_k, order, scores);
        else choose_scored(router, logits, scratch.by + thread * experts, order, scores);
        std::copy_n(order, top_k, choice.indices + token * top_k);
        if (router.renormalize) {
            const float chosen = std::accumulate(scores, scores + top_k, 0.0f);
            const float least = router.scoring == Scoring::kSigmoid ? 1e-20f : 0.0f;
            for (int rank = 0; rank < top_k; ++rank) scores[rank] /= chosen + least;
        }
        if (router.scaling != 1.0f) {
            for (int rank = 0; rank < top_k; ++rank) scores[rank] *= router.scaling;
        }
        store_floats(scores, top_k, router.score_dtype, element(choice.scores, router.score_dtype, token * top_k));
    });
}

}  // namespace

void multiply_to_floats(const void* weights, const void* x, DType dtype, int rows, int cols, int64_t tokens, float* out,
              int threads) {
    const int64_t own = std::min(tokens, kFewTokens) * cols, chunks = (tokens + kFewTokens - 1) / kFewTokens;
    if (rows * static_cast<int64_t>(cols) * tokens < kMinShared) threads = 1;
    if (chunks <= 1) {
        float* floats = Scratch::reserve(Scratch::bytes_of<float>(own)).take<float>(own);
        load_floats(x, dtype, own, floats);
        parallel_for((rows + kItemRows - 1) / kItemRows, threads, [&](int64_t item, int) {
            const int64_t first = item * kItemRows;
            tile_kernels().dot_rows(floats, static_cast<int>(tokens), element(weights, dtype, first * cols), dtype, cols,
                                    std::min<int64_t>(kItemRows, rows - first), cols, out + first, rows);
        });
        return;
    }
    float* floats = Scratch::reserve(Scratch::bytes_of<float>(threads * own)).take<float>(threads * own);
    parallel_for(chunks, threads, [&](int64_t chunk, int thread) {
        const int64_t first = chunk * kFewTokens, n = std::min(kFewTokens, tokens - first);
        load_floats(element(x, dtype, first * cols), dtype, n * cols, floats + thread * own);
        tile_kernels().dot_rows(floats + thread * own, static_cast<int>(n), weights, dtype, cols, rows, cols,
                                out + first * rows, rows);
    });
}

void multiply_few_rows(const void* weights, const void* x, DType dtype, int rows, int cols, int64_t tokens, void* out,
                       int threads) {
    for (int64_t first = 0; first < tokens; first += kMaxTokens) {
        const int64_t n = std::min(kMaxTokens, tokens - first);
        float* products =
            Scratch::reserve(Scratch::bytes_of<float>(n * rows), Scratch::kCaller).take<float>(n * rows);
        multiply_to_floats(weights, element(x, dtype, first * cols), dtype, rows, cols, n, products, threads);
        store_floats(products, n * rows, dtype, element(out, dtype, first * rows));
    }
}

std::vector<std::vector<std::pair<int, float>>> rank_experts(const void* weights, const void* x, DType dtype,
                                                             int experts, int hidden, int64_t tokens, int limit,
                                                             int threads) {
    limit = std::min(limit, experts);
    std::vector<std::vector<std::pair<int, float>>> ranked(tokens);
    for (int64_t first = 0; first < tokens; first += kMaxTokens) {
        const int64_t n = std::min(kMaxTokens, tokens - first);
        const ChoiceScratch scratch(n, experts, limit, 1);
        multiply_to_floats(weights, element(x, dtype, first * hidden), dtype, experts, hidden, n, scratch.logits, threads);
        for (int64_t token = 0; token < n; ++token) {
            top_of_softmax(scratch.logits + token * experts, experts, limit, scratch.order, scratch.probabilities);
            for (int i = 0; i < limit; ++i) {
                ranked[first + token].emplace_back(scratch.order[i], scratch.probabilities[i]);
            }
        }
    }
    return ranked;
}

void route(const Router& router, const void* x, DType dtype, int64_t tokens, const Choice& choice, int threads) {
    for (int64_t first = 0; first < tokens; first += kMaxTokens) {
        route_some(router, element(x, dtype, first * router.hidden), dtype, std::min(kMaxTokens, tokens - first),
                   {element(choice.logits, router.float_logits ? DType::kFloat32 : dtype, first * router.experts),
                    element(choice.scores, router.score_dtype, first * router.top_k),
                    choice.indices + first * router.top_k},
                   threads);
    }
}

int64_t gate_scratch_bytes(int hidden, int64_t tokens, int threads) {
    return Scratch::bytes_of<float>((tokens > kFewTokens ? threads : 1) * std::min(tokens, kFewTokens) * hidden);
}

int64_t choice_scratch_bytes(int experts, int64_t tokens, int threads) {
    return ChoiceScratch::bytes(std::min(tokens, kMaxTokens), experts, experts, threads);
}

}  // namespace fate
