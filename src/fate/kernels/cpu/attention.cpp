#include "attention.h"

#include <algorithm>
#include <cmath>

#include "activations.h"
#include "dispatch.h"
#include "scratch.h"
#include "team.h"

namespace fate {

namespace {

constexpr int kLanes = 16;
constexpr int kPositions = 4;                  // scored and weighed at once, so that sums do not wait for one another
constexpr int64_t kMinParallelWork = 1 << 15;  // multiplications that are worth a helper

// Positions of one head, `step` elements apart.
struct Positions {
    const void* base;
    int64_t step, count;
    int dim;
};

// scores[at] = scale * dot(q, key at) for `n` positions. The order of additions of a position never depends on n.
template <typename Type, int n>
__attribute__((always_inline)) inline void dot(const float* q, const typename Type::Item* key, int64_t step, int dim,
                                               float scale, float* scores) {
    float lanes[n][kLanes] = {};
    int i = 0;
    for (; i + kLanes <= dim; i += kLanes) {
        for (int p = 0; p < n; ++p) {
            for (int lane = 0; lane < kLanes; ++lane) lanes[p][lane] += Type::to_float(key[p * step + i + lane]) * q[i + lane];
        }
    }
    for (int p = 0; p < n; ++p) {
        for (int half = kLanes / 2; half >= 1; half /= 2) {
            for (int lane = 0; lane < half; ++lane) lanes[p][lane] += lanes[p][lane + half];
        }
        float sum = lanes[p][0];
        for (int at = i; at < dim; ++at) sum += Type::to_float(key[p * step + at]) * q[at];
        scores[p] = sum * scale;
    }
}

template <typename Type>
__attribute__((always_inline)) inline void dot_positions(const float* q, const Positions& keys, float scale,
                                                         float* scores) {
    const auto* key = static_cast<const typename Type::Item*>(keys.base);
    int64_t at = 0;
    for (; at + kPositions <= keys.count; at += kPositions, key += kPositions * keys.step)
        dot<Type, kPositions>(q, key, keys.step, keys.dim, scale, scores + at);
    for (; at < keys.count; ++at, key += keys.step) dot<Type, 1>(q, key, keys.step, keys.dim, scale, scores + at);
}

// out = sum over positions, in order, of weight * value.
template <typename Type>
__attribute__((always_inline)) inline void add_positions(const float* weights, const Positions& values, float* out) {
    const auto* value = static_cast<const typename Type::Item*>(values.base);
    const int64_t step = values.step;
    std::fill_n(out, values.dim, 0.0f);
    int64_t at = 0;
    for (; at + kPositions <= values.count; at += kPositions, value += kPositions * step) {
        const float *w = weights + at;
        for (int i = 0; i < values.dim; ++i) {
            float sum = out[i] + w[0] * Type::to_float(value[i]);
            sum += w[1] * Type::to_float(value[step + i]);
            sum += w[2] * Type::to_float(value[2 * step + i]);
            out[i] = sum + w[3] * Type::to_float(value[3 * step + i]);
        }
    }
    for (; at < values.count; ++at, value += step) {
        for (int i = 0; i < values.dim; ++i) out[i] += weights[at] * Type::to_float(value[i]);
    }
}

FATE_CLONES void compute_scores(DType dtype, const float* q, const Positions& keys, float scale, float* scores) {
    if (dtype == DType::kFloat32) dot_positions<Float32>(q, keys, scale, scores);
    else if (dtype == DType::kBFloat16) dot_positions<BFloat16>(q, keys, scale, scores);
    else dot_positions<Float16>(q, keys, scale, scores);
}

FATE_CLONES void weigh_values(DType dtype, const float* weights, const Positions& values, float* out) {
    if (dtype == DType::kFloat32) add_positions<Float32>(weights, values, out);
    else if (dtype == DType::kBFloat16) add_positions<BFloat16>(weights, values, out);
    else add_positions<Float16>(weights, values, out);
}

// In the order of kLanes interleaved sums, so that the loops vectorise and their order is always the same.
FATE_CLONES void softmax(float* scores, int64_t count) {
    float top = scores[0];
    for (int64_t i = 1; i < count; ++i) top = scores[i] > top ? scores[i] : top;
    for (int64_t i = 0; i < count; ++i) scores[i] = exp2_clamped((scores[i] - top) * kLog2E);
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += scores[i + lane];
    }
    float total = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
    for (; i < count; ++i) total += scores[i];
    const float inverse = 1.0f / total;
    for (int64_t at = 0; at < count; ++at) scores[at] *= inverse;
}

const void* element(const void* base, DType dtype, int64_t index) {
    return static_cast<const char*>(base) + index * item_bytes(dtype);
}

void attend_head(const AttentionCall& call, int64_t row, int64_t head) {
    const KVRow& kv = call.kv[row];
    const int64_t kv_head = head / (call.heads / call.kv_heads), at = row * call.heads + head;
    const int64_t count = kv.length - kv.start;
    const CacheStrides &k = call.key_strides, &v = call.value_strides;
    const Positions keys{element(kv.keys, call.dtype, kv_head * k.head + kv.start * k.position), k.position, count,
                         call.key_dim};
    const Positions values{element(kv.values, call.dtype, kv_head * v.head + kv.start * v.position), v.position, count,
                           call.value_dim};
    const int64_t floats = count + call.key_dim + call.value_dim;
    float* scores = Scratch::reserve(Scratch::rounded(floats * sizeof(float))).take<float>(floats);
    float *q = scores + count, *out = q + call.key_dim;
    load_floats(element(call.q, call.dtype, at * call.key_dim), call.dtype, call.key_dim, q);
    compute_scores(call.dtype, q, keys, call.scale, scores);
    softmax(scores, count);
    weigh_values(call.dtype, scores, values, out);
    char* to = static_cast<char*>(call.out) + at * call.value_dim * item_bytes(call.dtype);
    store_floats(out, call.value_dim, call.dtype, to);
}

}  // namespace

void attend(const AttentionCall& call) {
    int64_t positions = 0;
    for (int64_t row = 0; row < call.rows; ++row) positions += call.kv[row].length - call.kv[row].start;
    const int64_t work = positions * call.heads * (call.key_dim + call.value_dim);
    // Heads of one kv head are neighbours: a thread that does them in turn finds their keys in its cache.
    parallel_for(call.rows * call.heads, work < kMinParallelWork ? 1 : call.threads,
                 [&](int64_t item, int) { attend_head(call, item / call.heads, item % call.heads); });
}

}  // namespace fate
