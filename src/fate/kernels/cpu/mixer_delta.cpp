#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "gate.h"
#include "linear.h"
#include "mixer.h"
#include "team.h"
#include "activations.h"

namespace fate {

namespace {

constexpr int64_t kChannelsAtATime = 1024;
constexpr float kNormEps = 1e-6f;  // of queries and keys

// The newest input of `count` channels behind their last ones, and silu(conv + bias) of them -> x, in place.
template <typename Type>
FATE_INLINED inline void convolve(void* inputs, void* last, const void* weights, const void* bias, int kernel,
                                  int64_t count) {
    using T = typename Type::Element;
    T *x = static_cast<T*>(inputs), *held = static_cast<T*>(last);
    const T *weight = static_cast<const T*>(weights), *offset = static_cast<const T*>(bias);
    for (int64_t channel = 0; channel < count; ++channel) {
        T* own = held + channel * kernel;
        float sum = 0.0f;
        for (int i = 0; i + 1 < kernel; ++i) {
            own[i] = own[i + 1];
            sum += Type::load(own[i]) * Type::load(weight[channel * kernel + i]);
        }
        own[kernel - 1] = x[channel];
        sum += Type::load(x[channel]) * Type::load(weight[channel * kernel + kernel - 1]);
        if (offset != nullptr) sum += Type::load(offset[channel]);
        x[channel] = Type::round(silu(Type::load(Type::round(sum))));
    }
}

FATE_CLONES void convolve_channels(DType dtype, void* x, void* last, const void* weights, const void* bias, int kernel,
                                   int64_t count) {
    dispatch(dtype, [&](auto type) FATE_INLINED {
        convolve<decltype(type)>(x, last, weights, bias, kernel, count);
    });
}

FATE_CLONES float sum_of_squares(const float* x, int count) {
    float lanes[kLanes] = {};
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
    }
    for (; i < count; ++i) lanes[0] += x[i] * x[i];
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    return sum;
}

FATE_CLONES void scale_all(float factor, float* x, int count) {
    for (int i = 0; i < count; ++i) x[i] *= factor;
}

// state [keys, values] *= decay; sums [values] = k^T state.
FATE_CLONES void decay_state(float* state, const float* k, float decay, int keys, int values, float* sums) {
    for (int j = 0; j < values; ++j) sums[j] = 0.0f;
    for (int i = 0; i < keys; ++i) {
        float* row = state + static_cast<int64_t>(i) * values;
        for (int j = 0; j < values; ++j) {
            const float held = row[j] * decay;
            row[j] = held;
            sums[j] += held * k[i];
        }
    }
}

// state += k delta^T; out [values] = q^T state.
FATE_CLONES void update_state(float* state, const float* q, const float* k, const float* delta, int keys, int values,
                              float* out) {
    for (int j = 0; j < values; ++j) out[j] = 0.0f;
    for (int i = 0; i < keys; ++i) {
        float* row = state + static_cast<int64_t>(i) * values;
        for (int j = 0; j < values; ++j) {
            const float held = row[j] + k[i] * delta[j];
            row[j] = held;
            out[j] += held * q[i];
        }
    }
}

// x * silu(z), in float32, rounded once.
FATE_CLONES void multiply_by_silu(DType dtype, void* values, const void* z, int64_t count) {
    dispatch(dtype, [&](auto type) FATE_INLINED {
        using T = typename decltype(type)::Element;
        T* x = static_cast<T*>(values);
        const T* gate = static_cast<const T*>(z);
        for (int64_t i = 0; i < count; ++i) x[i] = type.round(type.load(x[i]) * silu(type.load(gate[i])));
    });
}

float one_value(const void* from, DType dtype, int64_t at) {
    float value;
    load_floats(static_cast<const char*>(from) + at * item_bytes(dtype), dtype, 1, &value);
    return value;
}

float rounded(float value, DType dtype) {
    char held[4];
    store_floats(&value, 1, dtype, held);
    return one_value(held, dtype, 0);
}

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

}  // namespace

int64_t DeltaRule::most_plain_rows() const {
    int64_t most = 0;
    for (const Input* input : {&qkv, &z, &b, &a}) {
        if (input->plain != nullptr) most = std::max<int64_t>(most, input->rows);
    }
    return most;
}

int64_t DeltaRule::scratch_bytes(int64_t rows, int) const {
    const int64_t heads = value_heads;
    return taken(rows * channels()) + 2 * taken(rows * values()) + 2 * taken(rows * heads) +
           taken(rows * (joined ? qkv.rows + b.rows : 0)) + (joined ? Scratch::kAlign : 0) +
           Scratch::bytes_of<float>(rows * heads * (2 * key_dim + 3 * value_dim)) +
           Scratch::bytes_of<float>(rows * most_plain_rows());
}

void DeltaRule::run(const MixerStep& step, Scratch& scratch) const {
    const int64_t rows = step.rows, heads = value_heads, per_key = heads / key_heads;
    char *mixed = take(scratch, rows * channels()), *gates = take(scratch, rows * values());
    char *betas = take(scratch, rows * heads), *alphas = take(scratch, rows * heads);
    float* products = scratch.take<float>(rows * most_plain_rows());
    const auto few = [&](const Input& input, void* out) {
        if (input.plain != nullptr) {
            multiply_to_floats(input.plain, step.x, dtype_, input.rows, hidden_, rows, products, step.threads);
            store_floats(products, rows * input.rows, dtype_, out);
        } else {
            linear({{input.packed.matrix, input.packed.bias, out}}, step.x, dtype_, rows, step.threads);
        }
    };
    if (joined) {
        char* all = take(scratch, rows * qkv.rows);
        char* both = take(scratch, rows * b.rows);
        few(qkv, all);
        few(b, both);
        const int64_t own_values = per_key * value_dim, own = 2 * key_dim + 2 * own_values;
        for (int64_t row = 0; row < rows; ++row) {
            char* to = mixed + bytes(row * channels());
            for (int64_t head = 0; head < key_heads; ++head) {
                const char* from = all + bytes(row * qkv.rows + head * own);
                const int64_t keys = static_cast<int64_t>(key_heads) * key_dim, before = head * own_values;
                std::memcpy(to + bytes(head * key_dim), from, bytes(key_dim));
                std::memcpy(to + bytes(keys + head * key_dim), from + bytes(key_dim), bytes(key_dim));
                std::memcpy(to + bytes(2 * keys + before), from + bytes(2 * key_dim), bytes(own_values));
                std::memcpy(gates + bytes(row * values() + before), from + bytes(2 * key_dim + own_values),
                            bytes(own_values));
                const char* pair = both + bytes(row * b.rows + head * 2 * per_key);
                std::memcpy(betas + bytes(row * heads + head * per_key), pair, bytes(per_key));
                std::memcpy(alphas + bytes(row * heads + head * per_key), pair + bytes(per_key), bytes(per_key));
            }
        }
    } else {
        if (qkv.plain == nullptr && z.plain == nullptr) {
            linear({{qkv.packed.matrix, qkv.packed.bias, mixed}, {z.packed.matrix, z.packed.bias, gates}}, step.x,
                   dtype_, rows, step.threads);
        } else {
            few(qkv, mixed);
            few(z, gates);
        }
        few(b, betas);
        few(a, alphas);
    }
    const int64_t pieces = (channels() + kChannelsAtATime - 1) / kChannelsAtATime;
    parallel_for(rows * pieces, step.threads, [&](int64_t item, int) {
        const int64_t row = item / pieces, first = item % pieces * kChannelsAtATime;
        convolve_channels(dtype_, mixed + bytes(row * channels() + first),
                          static_cast<char*>(step.states[row].conv) + bytes(first * kernel),
                          static_cast<const char*>(conv) + bytes(first * kernel),
                          conv_bias == nullptr ? nullptr : static_cast<const char*>(conv_bias) + bytes(first), kernel,
                          std::min(kChannelsAtATime, channels() - first));
    });
    char* out = take(scratch, rows * values());
    const int64_t own_floats = 2 * key_dim + 3 * value_dim;
    float* floats = scratch.take<float>(rows * heads * own_floats);
    parallel_for(rows * heads, step.threads, [&](int64_t item, int) {
        const int64_t row = item / heads, head = item % heads, keys = static_cast<int64_t>(key_heads) * key_dim;
        const char* own = mixed + bytes(row * channels());
        float *q = floats + item * own_floats, *k = q + key_dim, *v = k + key_dim, *sums = v + value_dim;
        float* result = sums + value_dim;
        load_floats(own + bytes(head / per_key * key_dim), dtype_, key_dim, q);
        load_floats(own + bytes(keys + head / per_key * key_dim), dtype_, key_dim, k);
        load_floats(own + bytes(2 * keys + head * value_dim), dtype_, value_dim, v);
        const float q_norm = 1.0f / std::sqrt(sum_of_squares(q, key_dim) + kNormEps);
        const float k_norm = 1.0f / std::sqrt(sum_of_squares(k, key_dim) + kNormEps);
        scale_all(q_norm, q, key_dim);
        scale_all(1.0f / std::sqrt(static_cast<float>(key_dim)), q, key_dim);
        scale_all(k_norm, k, key_dim);
        const float beta = rounded(1.0f / (1.0f + std::exp(-one_value(betas, dtype_, item))), dtype_);
        const float forget =
            std::exp(decay[head] * softplus(one_value(alphas, dtype_, item) + dt_bias[head]));
        float* state = step.states[row].state + head * key_dim * value_dim;
        decay_state(state, k, forget, key_dim, value_dim, sums);
        for (int j = 0; j < value_dim; ++j) sums[j] = (v[j] - sums[j]) * beta;
        update_state(state, q, k, sums, key_dim, value_dim, result);
        char* to = out + bytes(item * value_dim);
        store_floats(result, value_dim, dtype_, to);
        rms_norm(norm, to, dtype_, 1, to, 1);
        multiply_by_silu(dtype_, to, gates + bytes(item * value_dim), value_dim);
    });
    linear({{output.matrix, output.bias, step.out}}, out, dtype_, rows, step.threads);
}

}  // namespace fate
