#include "fused.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "gate.h"
#include "linear.h"
#include "team.h"

namespace fate {

namespace {

constexpr int kLanes = 16;
constexpr int64_t kMinParallelFloats = 1 << 15;  // numbers that are worth a helper

inline float same(float value) { return value; }

template <typename T, float (*Float)(T)>
__attribute__((always_inline)) inline float mean_of_squares(const T* x, int n) {
    float lanes[kLanes] = {};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += Float(x[i + lane]) * Float(x[i + lane]);
    }
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    for (; i < n; ++i) sum += Float(x[i]) * Float(x[i]);
    return sum / static_cast<float>(n);
}

template <typename T, float (*Float)(T), T (*Round)(float)>
__attribute__((always_inline)) inline void normalize(const Norm& norm, const void* x_row, void* out_row) {
    const T *x = static_cast<const T*>(x_row), *weight = static_cast<const T*>(norm.weight);
    T* out = static_cast<T*>(out_row);
    const float scale = 1.0f / std::sqrt(mean_of_squares<T, Float>(x, norm.cols) + norm.eps);
    if (norm.rounds_first) {
        for (int i = 0; i < norm.cols; ++i) out[i] = Round(Float(weight[i]) * Float(Round(Float(x[i]) * scale)));
    } else {
        for (int i = 0; i < norm.cols; ++i) out[i] = Round(Float(weight[i]) * (Float(x[i]) * scale));
    }
}

// One head of one token, in place. Sums and products are rounded one by one, as torch's operations do.
template <typename T, float (*Float)(T), T (*Round)(float)>
__attribute__((always_inline)) inline void rotate(void* head, const void* cos_row, const void* sin_row, int dim) {
    T* x = static_cast<T*>(head);
    const T *cos = static_cast<const T*>(cos_row), *sin = static_cast<const T*>(sin_row);
    const int half = dim / 2;
    for (int i = 0; i < half; ++i) {
        const float first = Float(x[i]), second = Float(x[i + half]);
        const float turned = Float(Round(-second * Float(sin[i])));
        const float turned_back = Float(Round(first * Float(sin[i + half])));
        x[i] = Round(Float(Round(first * Float(cos[i]))) + turned);
        x[i + half] = Round(Float(Round(second * Float(cos[i + half]))) + turned_back);
    }
}

template <typename T, float (*Float)(T), T (*Round)(float)>
__attribute__((always_inline)) inline void gate_with_silu(void* gate, const void* up, int64_t count) {
    T* g = static_cast<T*>(gate);
    const T* u = static_cast<const T*>(up);
    for (int64_t i = 0; i < count; ++i) g[i] = Round(Float(Round(silu(Float(g[i])))) * Float(u[i]));
}

template <typename T, float (*Float)(T), T (*Round)(float)>
__attribute__((always_inline)) inline void sum(const void* first, const void* second, int64_t count, void* to) {
    const T *x = static_cast<const T*>(first), *y = static_cast<const T*>(second);
    T* out = static_cast<T*>(to);
    for (int64_t i = 0; i < count; ++i) out[i] = Round(Float(x[i]) + Float(y[i]));
}

FATE_CLONES void add(DType dtype, const void* x, const void* y, int64_t count, void* out) {
    if (dtype == DType::kFloat32) sum<float, same, same>(x, y, count, out);
    else if (dtype == DType::kBFloat16) sum<uint16_t, bfloat16_to_float, float_to_bfloat16>(x, y, count, out);
    else sum<uint16_t, half_to_float, float_to_half>(x, y, count, out);
}

// out = experts + sigmoid(logit) * shared, each operation rounded.
template <typename T, float (*Float)(T), T (*Round)(float)>
__attribute__((always_inline)) inline void add_times_sigmoid(const void* experts, const void* shared, const void* logit,
                                                             int64_t count, void* to) {
    const T *x = static_cast<const T*>(experts), *y = static_cast<const T*>(shared);
    T* out = static_cast<T*>(to);
    const float gate = Float(Round(1.0f / (1.0f + std::exp(-Float(*static_cast<const T*>(logit))))));
    for (int64_t i = 0; i < count; ++i) out[i] = Round(Float(x[i]) + Float(Round(gate * Float(y[i]))));
}

FATE_CLONES void add_gated_row(DType dtype, const void* experts, const void* shared, const void* logit, int64_t count,
                               void* out) {
    if (dtype == DType::kFloat32) add_times_sigmoid<float, same, same>(experts, shared, logit, count, out);
    else if (dtype == DType::kBFloat16)
        add_times_sigmoid<uint16_t, bfloat16_to_float, float_to_bfloat16>(experts, shared, logit, count, out);
    else add_times_sigmoid<uint16_t, half_to_float, float_to_half>(experts, shared, logit, count, out);
}

FATE_CLONES void normalize_row(const Norm& norm, DType dtype, const void* x, void* out) {
    if (dtype == DType::kFloat32) normalize<float, same, same>(norm, x, out);
    else if (dtype == DType::kBFloat16) normalize<uint16_t, bfloat16_to_float, float_to_bfloat16>(norm, x, out);
    else normalize<uint16_t, half_to_float, float_to_half>(norm, x, out);
}

FATE_CLONES void rotate_head(DType dtype, void* head, const void* cos, const void* sin, int dim) {
    if (dtype == DType::kFloat32) rotate<float, same, same>(head, cos, sin, dim);
    else if (dtype == DType::kBFloat16) rotate<uint16_t, bfloat16_to_float, float_to_bfloat16>(head, cos, sin, dim);
    else rotate<uint16_t, half_to_float, float_to_half>(head, cos, sin, dim);
}

FATE_CLONES void swiglu_in_place(DType dtype, void* gate, const void* up, int64_t count) {
    if (dtype == DType::kFloat32) gate_with_silu<float, same, same>(gate, up, count);
    else if (dtype == DType::kBFloat16) gate_with_silu<uint16_t, bfloat16_to_float, float_to_bfloat16>(gate, up, count);
    else gate_with_silu<uint16_t, half_to_float, float_to_half>(gate, up, count);
}

void* element(void* base, DType dtype, int64_t index) { return static_cast<char*>(base) + index * item_bytes(dtype); }

const void* element(const void* base, DType dtype, int64_t index) {
    return static_cast<const char*>(base) + index * item_bytes(dtype);
}

// Norm and rotation of what a matrix gave.
void finish(const HeadsCall& call, const Projection& to) {
    const int64_t rows = to.matrix.rows, heads = rows / call.head_dim;
    if (to.norm.weight != nullptr)
        rms_norm(to.norm, to.out, call.dtype, call.tokens * rows / to.norm.cols, to.out, call.threads);
    for (int64_t at = 0; at < call.tokens * heads; ++at) {
        const int64_t place = at / heads * call.rotary.step;
        rotate_head(call.dtype, element(to.out, call.dtype, at * call.head_dim),
                    element(call.rotary.cos, call.dtype, place), element(call.rotary.sin, call.dtype, place),
                    call.rotary.dim);
    }
}

Product product_of(const Projection& to) { return {to.matrix, to.bias, to.out}; }

// Heads [tokens, kv_heads, dim] -> their last position in the cache.
void append(const AttentionCall& call, const void* heads, int dim, const CacheStrides& strides, void* cache) {
    for (int64_t at = 0; at < call.batch * call.kv_heads; ++at) {
        const int64_t place = at / call.kv_heads * strides.batch + at % call.kv_heads * strides.head +
                              (call.length - 1) * strides.position;
        std::memcpy(element(cache, call.dtype, place), element(heads, call.dtype, at * dim),
                    dim * item_bytes(call.dtype));
    }
}

}  // namespace

void rms_norm(const Norm& norm, const void* x, DType dtype, int64_t rows, void* out, int threads) {
    parallel_for(rows, rows * norm.cols < kMinParallelFloats ? 1 : threads, [&](int64_t row, int) {
        normalize_row(norm, dtype, element(x, dtype, row * norm.cols), element(out, dtype, row * norm.cols));
    });
}

void project_heads(const HeadsCall& call) {
    linear({product_of(call.query), product_of(call.key), product_of(call.value)}, call.x, call.dtype, call.tokens,
           call.threads);
    finish(call, call.query);
    finish(call, call.key);
}

void gated_mlp(const Matrix& gate, const Matrix& up, const Matrix& down, const void* x, DType dtype, int64_t tokens,
               void* out, int threads) {
    const int64_t count = tokens * gate.rows;
    std::vector<float> memory(2 * count);  // enough for any dtype
    void *gated = memory.data(), *upped = memory.data() + count;
    linear({{gate, nullptr, gated}, {up, nullptr, upped}}, x, dtype, tokens, threads);
    swiglu_in_place(dtype, gated, upped, count);
    linear({{down, nullptr, out}}, gated, dtype, tokens, threads);
}

void add_gated(const void* experts, const void* shared, const void* x, const void* weight, DType dtype, int64_t tokens,
               int hidden, void* out) {
    std::vector<float> logits(tokens);
    multiply_few_rows(weight, x, dtype, 1, hidden, tokens, logits.data());
    for (int64_t token = 0; token < tokens; ++token) {
        const int64_t at = token * hidden;
        add_gated_row(dtype, element(experts, dtype, at), element(shared, dtype, at),
                      element(static_cast<const void*>(logits.data()), dtype, token), hidden, element(out, dtype, at));
    }
}

void add_values(const void* x, const void* y, DType dtype, int64_t count, void* out) { add(dtype, x, y, count, out); }

void attend_project(AttentionCall call, const Matrix& matrix, const void* bias, void* out) {
    std::vector<float> heads(call.batch * call.heads * call.value_dim);
    call.out = heads.data();
    attend(call);
    linear({{matrix, bias, out}}, heads.data(), call.dtype, call.batch, call.threads);
}

void attention_half(AttentionHalf half) {
    HeadsCall& heads = half.heads;
    AttentionCall& attention = half.attention;
    const int64_t tokens = heads.tokens, hidden = tokens * half.before.cols;
    const int64_t queries = tokens * heads.query.matrix.rows, keys = tokens * heads.key.matrix.rows;
    std::vector<float> memory(hidden + queries + 2 * keys);  // enough for any dtype
    const void* x = heads.x;
    float* normed = memory.data();
    heads.query.out = normed + hidden;
    heads.key.out = normed + hidden + queries;
    heads.value.out = normed + hidden + queries + keys;
    rms_norm(half.before, x, heads.dtype, tokens, normed, heads.threads);
    heads.x = normed;
    project_heads(heads);
    append(attention, heads.key.out, attention.key_dim, attention.key_strides, half.keys);
    append(attention, heads.value.out, attention.value_dim, attention.value_strides, half.values);
    attention.q = heads.query.out;
    attend_project(attention, half.output, half.output_bias, normed);
    add(heads.dtype, x, normed, hidden, half.residual);
    rms_norm(half.after, half.residual, heads.dtype, tokens, half.normed, heads.threads);
}

}  // namespace fate
