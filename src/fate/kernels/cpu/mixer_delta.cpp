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

// Of one channel and token: its new input behind the last ones, and silu(conv + bias).
template <typename Type>
FATE_INLINED inline typename Type::Element convolved(typename Type::Element input, typename Type::Element* last,
                                                     const typename Type::Element* weight, float offset, int kernel) {
    float sum = 0.0f;
    for (int i = 0; i + 1 < kernel; ++i) {
        last[i] = last[i + 1];
        sum += Type::load(last[i]) * Type::load(weight[i]);
    }
    last[kernel - 1] = input;
    sum += Type::load(input) * Type::load(weight[kernel - 1]);
    return Type::round(silu(Type::load(Type::round(sum + offset))));
}

// `count` channels of `tokens` tokens, `pitch` elements apart, in place.
FATE_CLONES void convolve_channels(DType dtype, void* inputs, int64_t tokens, int64_t pitch, void* last,
                                   const void* weights, const void* bias, int kernel, int64_t count) {
    dispatch(dtype, [&](auto type) FATE_INLINED {
        using Type = decltype(type);
        using T = typename Type::Element;
        T *x = static_cast<T*>(inputs), *held = static_cast<T*>(last);
        const T *weight = static_cast<const T*>(weights), *offsets = static_cast<const T*>(bias);
        for (int64_t token = 0; token < tokens; ++token, x += pitch) {
            for (int64_t channel = 0; channel < count; ++channel) {
                const float offset = offsets == nullptr ? 0.0f : Type::load(offsets[channel]);
                x[channel] = convolved<Type>(x[channel], held + channel * kernel, weight + channel * kernel, offset,
                                             kernel);
            }
        }
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

int64_t DeltaRule::scratch_bytes(int64_t rows, int threads) const {
    const int64_t heads = value_heads;
    return taken(rows * channels()) + 2 * taken(rows * values()) + 2 * taken(rows * heads) +
           (joined ? taken(rows * qkv.rows) + taken(rows * b.rows) : 0) +
           Scratch::bytes_of<float>(threads * own_floats()) + Scratch::bytes_of<float>(rows * most_plain_rows());
}

void DeltaRule::run(const MixerStep& step, Scratch& scratch) const {
    const int64_t rows = step.rows, heads = value_heads;
    char *mixed = take(scratch, rows * channels()), *gates = take(scratch, rows * values());
    char *betas = take(scratch, rows * heads), *alphas = take(scratch, rows * heads);
    char* out = take(scratch, rows * values());
    float* floats = scratch.take<float>(step.threads * own_floats());
    project(step, mixed, gates, betas, alphas, scratch);
    convolve(step, mixed);
    parallel_for(rows / step.tokens * heads, step.threads, [&](int64_t item, int thread) {
        update(step, item / heads, item % heads, mixed, gates, betas, alphas, out, floats + thread * own_floats());
    });
    linear({{output.matrix, output.bias, step.out}}, out, dtype_, rows, step.threads);
}

// x -> what the convolution takes [rows, channels], z [rows, values], b and a [rows, value heads].
void DeltaRule::project(const MixerStep& step, char* mixed, char* gates, char* betas, char* alphas,
                        Scratch& scratch) const {
    const int64_t rows = step.rows, heads = value_heads, per_key = heads / key_heads;
    float* products = scratch.take<float>(rows * most_plain_rows());
    const auto multiply = [&](const Input& input, void* to) {
        if (input.plain != nullptr) {
            multiply_to_floats(input.plain, step.x, dtype_, input.rows, hidden_, rows, products, step.threads);
            store_floats(products, rows * input.rows, dtype_, to);
        } else {
            linear({{input.packed.matrix, input.packed.bias, to}}, step.x, dtype_, rows, step.threads);
        }
    };
    if (!joined) {
        if (qkv.plain == nullptr && z.plain == nullptr) {
            linear({{qkv.packed.matrix, qkv.packed.bias, mixed}, {z.packed.matrix, z.packed.bias, gates}}, step.x,
                   dtype_, rows, step.threads);
        } else {
            multiply(qkv, mixed);
            multiply(z, gates);
        }
        multiply(b, betas);
        multiply(a, alphas);
        return;
    }
    char *all = take(scratch, rows * qkv.rows), *both = take(scratch, rows * b.rows);
    multiply(qkv, all);
    multiply(b, both);
    const int64_t own_values = per_key * value_dim, own = 2 * key_dim + 2 * own_values;
    const int64_t keys = static_cast<int64_t>(key_heads) * key_dim;
    parallel_for(rows, rows > 16 ? step.threads : 1, [&](int64_t row, int) {
        char* to = mixed + bytes(row * channels());
        for (int64_t head = 0; head < key_heads; ++head) {
            const char* from = all + bytes(row * qkv.rows + head * own);
            const int64_t before = head * own_values;
            std::memcpy(to + bytes(head * key_dim), from, bytes(key_dim));
            std::memcpy(to + bytes(keys + head * key_dim), from + bytes(key_dim), bytes(key_dim));
            std::memcpy(to + bytes(2 * keys + before), from + bytes(2 * key_dim), bytes(own_values));
            std::memcpy(gates + bytes(row * values() + before), from + bytes(2 * key_dim + own_values),
                        bytes(own_values));
            const char* pair = both + bytes(row * b.rows + head * 2 * per_key);
            std::memcpy(betas + bytes(row * heads + head * per_key), pair, bytes(per_key));
            std::memcpy(alphas + bytes(row * heads + head * per_key), pair + bytes(per_key), bytes(per_key));
        }
    });
}

void DeltaRule::convolve(const MixerStep& step, char* mixed) const {
    const int64_t pieces = (channels() + kChannelsAtATime - 1) / kChannelsAtATime, tokens = step.tokens;
    parallel_for(step.rows / tokens * pieces, step.threads, [&](int64_t item, int) {
        const int64_t sequence = item / pieces, first = item % pieces * kChannelsAtATime;
        convolve_channels(dtype_, mixed + bytes(sequence * tokens * channels() + first), tokens, channels(),
                          static_cast<char*>(step.states[sequence].conv) + bytes(first * kernel),
                          static_cast<const char*>(conv) + bytes(first * kernel),
                          conv_bias == nullptr ? nullptr : static_cast<const char*>(conv_bias) + bytes(first), kernel,
                          std::min(kChannelsAtATime, channels() - first));
    });
}

// One value head of one sequence, token after token.
void DeltaRule::update(const MixerStep& step, int64_t sequence, int64_t head, const char* mixed, const char* gates,
                       const char* betas, const char* alphas, char* out, float* floats) const {
    const int64_t heads = value_heads, keys = static_cast<int64_t>(key_heads) * key_dim;
    const int64_t key_head = head / (heads / key_heads);
    float *q = floats, *k = q + key_dim, *v = k + key_dim, *sums = v + value_dim, *result = sums + value_dim;
    float* state = step.states[sequence].state + head * key_dim * value_dim;
    const float scale = 1.0f / std::sqrt(static_cast<float>(key_dim));
    for (int64_t row = sequence * step.tokens; row < (sequence + 1) * step.tokens; ++row) {
        const char* own = mixed + bytes(row * channels());
        load_floats(own + bytes(key_head * key_dim), dtype_, key_dim, q);
        load_floats(own + bytes(keys + key_head * key_dim), dtype_, key_dim, k);
        load_floats(own + bytes(2 * keys + head * value_dim), dtype_, value_dim, v);
        scale_all(1.0f / std::sqrt(sum_of_squares(q, key_dim) + kNormEps), q, key_dim);
        scale_all(scale, q, key_dim);
        scale_all(1.0f / std::sqrt(sum_of_squares(k, key_dim) + kNormEps), k, key_dim);
        const int64_t at = row * heads + head;
        const float beta = rounded(1.0f / (1.0f + std::exp(-one_value(betas, dtype_, at))), dtype_);
        const float forget = std::exp(decay[head] * softplus(one_value(alphas, dtype_, at) + dt_bias[head]));
        decay_state(state, k, forget, key_dim, value_dim, sums);
        for (int j = 0; j < value_dim; ++j) sums[j] = (v[j] - sums[j]) * beta;
        update_state(state, q, k, sums, key_dim, value_dim, result);
        char* to = out + bytes(at * value_dim);
        store_floats(result, value_dim, dtype_, to);
        rms_norm(norm, to, dtype_, 1, to, 1);
        multiply_by_silu(dtype_, to, gates + bytes(at * value_dim), value_dim);
    }
}

}  // namespace fate
