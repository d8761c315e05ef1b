#include "attention.h"

#include <algorithm>
#include <cmath>

#include "activations.h"
#include "scratch.h"
#include "team.h"

namespace fate {

namespace {

constexpr int kLanes = 16;
constexpr int64_t kMinParallelWork = 1 << 15;  // multiplications that are worth a helper

inline float same(float value) { return value; }

// Cache positions [length], `step` elements apart.
struct Positions {
    const void* base;
    int64_t step, length;
    int dim;
};

template <typename T, float (*Float)(T)>
__attribute__((always_inline)) inline void dot_positions(const float* q, const Positions& keys, float scale, float* scores) {
    const T* key = static_cast<const T*>(keys.base);
    for (int64_t at = 0; at < keys.length; ++at, key += keys.step) {
        float lanes[kLanes] = {};
        int i = 0;
        for (; i + kLanes <= keys.dim; i += kLanes) {
            for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += Float(key[i + lane]) * q[i + lane];
        }
        for (int half = kLanes / 2; half >= 1; half /= 2) {
            for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
        }
        float sum = lanes[0];
        for (; i < keys.dim; ++i) sum += Float(key[i]) * q[i];
        scores[at] = sum * scale;
    }
}

template <typename T, float (*Float)(T)>
__attribute__((always_inline)) inline void add_positions(const float* weights, const Positions& values, float* out) {
    const T* value = static_cast<const T*>(values.base);
    std::fill_n(out, values.dim, 0.0f);
    for (int64_t at = 0; at < values.length; ++at, value += values.step) {
        const float weight = weights[at];
        for (int i = 0; i < values.dim; ++i) out[i] += weight * Float(value[i]);
    }
}

FATE_CLONES void compute_scores(DType dtype, const float* q, const Positions& keys, float scale, float* scores) {
    if (dtype == DType::kFloat32) dot_positions<float, same>(q, keys, scale, scores);
    else if (dtype == DType::kBFloat16) dot_positions<uint16_t, bfloat16_to_float>(q, keys, scale, scores);
    else dot_positions<uint16_t, half_to_float>(q, keys, scale, scores);
}

FATE_CLONES void weigh_values(DType dtype, const float* weights, const Positions& values, float* out) {
    if (dtype == DType::kFloat32) add_positions<float, same>(weights, values, out);
    else if (dtype == DType::kBFloat16) add_positions<uint16_t, bfloat16_to_float>(weights, values, out);
    else add_positions<uint16_t, half_to_float>(weights, values, out);
}

void softmax(float* scores, int64_t count) {
    const float top = *std::max_element(scores, scores + count);
    float total = 0.0f;
    for (int64_t i = 0; i < count; ++i) total += scores[i] = std::exp(scores[i] - top);
    const float inverse = 1.0f / total;
    for (int64_t i = 0; i < count; ++i) scores[i] *= inverse;
}

const void* element(const void* base, DType dtype, int64_t index) {
    return static_cast<const char*>(base) + index * item_bytes(dtype);
}

void attend_head(const AttentionCall& call, int64_t entry, int64_t head) {
    const int64_t kv_head = head / (call.heads / call.kv_heads), row = entry * call.heads + head;
    const CacheStrides &k = call.key_strides, &v = call.value_strides;
    const Positions keys{element(call.keys, call.dtype, entry * k.batch + kv_head * k.head), k.position, call.length,
                         call.key_dim};
    const Positions values{element(call.values, call.dtype, entry * v.batch + kv_head * v.head), v.position,
                           call.length, call.value_dim};
    const int64_t bytes = Scratch::rounded((call.length + call.key_dim + call.value_dim) * sizeof(float));
    float* scores = Scratch::reserve(bytes).take<float>(call.length + call.key_dim + call.value_dim);
    float *q = scores + call.length, *out = q + call.key_dim;
    load_floats(element(call.q, call.dtype, row * call.key_dim), call.dtype, call.key_dim, q);
    compute_scores(call.dtype, q, keys, call.scale, scores);
    softmax(scores, call.length);
    weigh_values(call.dtype, scores, values, out);
    char* to = static_cast<char*>(call.out) + row * call.value_dim * item_bytes(call.dtype);
    store_floats(out, call.value_dim, call.dtype, to);
}

}  // namespace

void attend(const AttentionCall& call) {
    const int64_t work = call.batch * call.heads * call.length * (call.key_dim + call.value_dim);
    parallel_for(call.batch * call.heads, work < kMinParallelWork ? 1 : call.threads,
                 [&](int64_t item, int) { attend_head(call, item / call.heads, item % call.heads); });
}

}  // namespace fate
