#include "ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "gate.h"
#include "linear.h"
#include "scratch.h"
#include "team.h"

namespace fate {

namespace {

constexpr int64_t kMinParallelFloats = 1 << 15;  // numbers that are worth a helper
constexpr int64_t kMlpTokens = 128;              // whose intermediate values are kept at a time
constexpr int64_t kGatedTokens = 64;             // whose gates are

template <typename Type>
FATE_INLINED inline float mean_of_squares(const typename Type::Element* x, int n) {
    float lanes[kLanes] = {};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += Type::load(x[i + lane]) * Type::load(x[i + lane]);
    }
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    for (; i < n; ++i) sum += Type::load(x[i]) * Type::load(x[i]);
    return sum / static_cast<float>(n);
}

template <typename Type>
FATE_INLINED inline void normalize(const Norm& norm, const void* x_row, void* out_row) {
    using T = typename Type::Element;
    const T *x = static_cast<const T*>(x_row), *weight = static_cast<const T*>(norm.weight);
    T* out = static_cast<T*>(out_row);
    const float scale = 1.0f / std::sqrt(mean_of_squares<Type>(x, norm.cols) + norm.eps);
    if (norm.plus_one) {
        for (int i = 0; i < norm.cols; ++i) {
            out[i] = Type::round(Type::load(x[i]) * scale * (1.0f + Type::load(weight[i])));
        }
    } else if (norm.round_before_scale) {
        for (int i = 0; i < norm.cols; ++i) {
            out[i] = Type::round(Type::load(weight[i]) * Type::load(Type::round(Type::load(x[i]) * scale)));
        }
    } else {
        for (int i = 0; i < norm.cols; ++i) {
            out[i] = Type::round(Type::load(weight[i]) * (Type::load(x[i]) * scale));
        }
    }
}

// One head of one token, in place. Sums and products are rounded one by one, as torch's operations do. `second`: from
// the angles of the first half to those of the second.
template <typename Type>
FATE_INLINED inline void rotate_halves(void* head, const void* cos_row, const void* sin_row, int dim, int second_at) {
    using T = typename Type::Element;
    T* x = static_cast<T*>(head);
    const T *cos = static_cast<const T*>(cos_row), *sin = static_cast<const T*>(sin_row);
    const auto rounded = [](float value) FATE_INLINED { return Type::load(Type::round(value)); };
    const int half = dim / 2;
    for (int i = 0; i < half; ++i) {
        const float first = Type::load(x[i]), second = Type::load(x[i + half]);
        const float turned = rounded(-second * Type::load(sin[i]));
        const float turned_back = rounded(first * Type::load(sin[i + second_at]));
        x[i] = Type::round(rounded(first * Type::load(cos[i])) + turned);
        x[i + half] = Type::round(rounded(second * Type::load(cos[i + second_at])) + turned_back);
    }
}

constexpr int kMostPairs = 512;  // of a rotated part whose halves are put apart

template <typename Type>
FATE_INLINED inline void rotate_pairs_to_halves(void* head, const void* cos_row, const void* sin_row, int dim) {
    using T = typename Type::Element;
    T* x = static_cast<T*>(head);
    const T *cos = static_cast<const T*>(cos_row), *sin = static_cast<const T*>(sin_row);
    const auto rounded = [](float value) FATE_INLINED { return Type::load(Type::round(value)); };
    T second_half[kMostPairs];
    const int half = dim / 2;
    for (int i = 0; i < half; ++i) {  // x[i] is read no more once it is written
        const float first = Type::load(x[2 * i]), second = Type::load(x[2 * i + 1]);
        const float c = Type::load(cos[i]), s = Type::load(sin[i]);
        x[i] = Type::round(rounded(first * c) - rounded(second * s));
        second_half[i] = Type::round(rounded(second * c) + rounded(first * s));
    }
    std::memcpy(x + half, second_half, half * sizeof(T));
}

template <typename Type>
FATE_INLINED inline void rotate_pairs(void* head, const float* angles, int dim) {
    using T = typename Type::Element;
    T* x = static_cast<T*>(head);
    for (int i = 0; i < dim; i += 2) {
        const float first = Type::load(x[i]), second = Type::load(x[i + 1]);
        x[i] = Type::round(first * angles[i] - second * angles[i + 1]);
        x[i + 1] = Type::round(first * angles[i + 1] + second * angles[i]);
    }
}

FATE_CLONES void normalize_row(const Norm& norm, DType dtype, const void* x, void* out) {
    dispatch(dtype, [&](auto type) FATE_INLINED { normalize<decltype(type)>(norm, x, out); });
}

FATE_CLONES void rotate(Rotation kind, DType dtype, void* head, const void* cos, const void* sin, int dim) {
    dispatch(dtype, [&](auto type) FATE_INLINED {
        using Type = decltype(type);
        if (kind == Rotation::kPairs) rotate_pairs<Type>(head, static_cast<const float*>(cos), dim);
        else if (kind == Rotation::kPairsToHalves) rotate_pairs_to_halves<Type>(head, cos, sin, dim);
        else rotate_halves<Type>(head, cos, sin, dim, kind == Rotation::kHalves ? dim / 2 : 0);
    });
}

FATE_CLONES void multiply_by_sigmoids(DType dtype, void* values, const void* gates, int64_t count) {
    dispatch(dtype, [&](auto type) FATE_INLINED {
        using T = typename decltype(type)::Element;
        T* x = static_cast<T*>(values);
        const T* gate = static_cast<const T*>(gates);
        for (int64_t i = 0; i < count; ++i) {
            const float open = 1.0f / (1.0f + exp2_clamped(-kLog2E * type.load(gate[i])));
            x[i] = type.round(type.load(x[i]) * type.load(type.round(open)));
        }
    });
}

FATE_CLONES void swiglu_in_place(DType dtype, void* gate, const void* up, int64_t count) {
    dispatch(dtype, [&](auto type) FATE_INLINED {
        using T = typename decltype(type)::Element;
        T* g = static_cast<T*>(gate);
        const T* u = static_cast<const T*>(up);
        for (int64_t i = 0; i < count; ++i) {
            g[i] = type.round(type.load(type.round(silu(type.load(g[i])))) * type.load(u[i]));
        }
    });
}

FATE_CLONES void add(DType dtype, const void* first, const void* second, int64_t count, void* to) {
    dispatch(dtype, [&](auto type) FATE_INLINED {
        using T = typename decltype(type)::Element;
        const T *x = static_cast<const T*>(first), *y = static_cast<const T*>(second);
        T* out = static_cast<T*>(to);
        for (int64_t i = 0; i < count; ++i) out[i] = type.round(type.load(x[i]) + type.load(y[i]));
    });
}

// out = experts + sigmoid(logit) * shared, each operation rounded.
FATE_CLONES void add_gated_row(DType dtype, const void* experts, const void* shared, const void* logit, int64_t count,
                               void* to) {
    dispatch(dtype, [&](auto type) FATE_INLINED {
        using T = typename decltype(type)::Element;
        const T *x = static_cast<const T*>(experts), *y = static_cast<const T*>(shared);
        T* out = static_cast<T*>(to);
        const float given = type.load(*static_cast<const T*>(logit));
        const float gate = type.load(type.round(1.0f / (1.0f + std::exp(-given))));
        for (int64_t i = 0; i < count; ++i) {
            out[i] = type.round(type.load(x[i]) + type.load(type.round(gate * type.load(y[i]))));
        }
    });
}

void* element(void* base, DType dtype, int64_t index) { return static_cast<char*>(base) + index * item_bytes(dtype); }

const void* element(const void* base, DType dtype, int64_t index) {
    return static_cast<const char*>(base) + index * item_bytes(dtype);
}

int threads_for(int64_t floats, int threads) { return floats < kMinParallelFloats ? 1 : threads; }

// Norm and rotation of a token's `rows` queries or keys.
void finish(const HeadsCall& call, const Projection& to, int64_t rows, int64_t token) {
    void* heads = element(to.out, call.dtype, token * rows);
    if (to.norm.weight != nullptr) {
        for (int64_t at = 0; at < rows; at += to.norm.cols) {
            normalize_row(to.norm, call.dtype, element(heads, call.dtype, at), element(heads, call.dtype, at));
        }
    }
    for (int64_t at = 0; at < rows; at += call.head_dim) {
        rotate_head(call.rotary, token, call.dtype, element(heads, call.dtype, at));
    }
}

// What the query matrix gave of a token -> its queries and its gates.
void part_gates(const HeadsCall& call, int64_t token) {
    const int64_t rows = call.query_rows(), bytes = call.head_dim * item_bytes(call.dtype);
    const char* from = static_cast<const char*>(element(call.joined, call.dtype, token * call.query.matrix.rows));
    for (int64_t at = token * rows; at < (token + 1) * rows; at += call.head_dim, from += 2 * bytes) {
        std::memcpy(element(call.query.out, call.dtype, at), from, bytes);
        std::memcpy(element(call.gates, call.dtype, at), from + bytes, bytes);
    }
}

// A token's heads -> the last position of its row of the cache.
void append(const HeadsCall& call, const Projection& from, int64_t token, const CacheStrides& strides, void* cache) {
    const int64_t rows = from.matrix.rows, last = (call.cache[token].length - 1) * strides.position;
    for (int64_t head = 0; head < rows / call.head_dim; ++head) {
        std::memcpy(element(cache, call.dtype, head * strides.head + last),
                    element(from.out, call.dtype, token * rows + head * call.head_dim),
                    call.head_dim * item_bytes(call.dtype));
    }
}

Product product_of(const Projection& to) { return {to.matrix, to.bias, to.out}; }

}  // namespace

void rotate_head(const Rotary& rotary, int64_t token, DType dtype, void* head) {
    const int64_t at = token * rotary.step * (rotary.kind == Rotation::kPairs ? 4 : item_bytes(dtype));
    const auto angles = [at](const void* of) { return static_cast<const char*>(of) + at; };
    rotate(rotary.kind, dtype, head, angles(rotary.cos), angles(rotary.sin), rotary.dim);
}

void multiply_by_gates(void* x, const void* gates, DType dtype, int64_t count) {
    multiply_by_sigmoids(dtype, x, gates, count);
}

void rms_norm(const Norm& norm, const void* x, DType dtype, int64_t rows, void* out, int threads) {
    parallel_for(rows, threads_for(rows * norm.cols, threads), [&](int64_t row, int) {
        normalize_row(norm, dtype, element(x, dtype, row * norm.cols), element(out, dtype, row * norm.cols));
    });
}

void project_heads(const HeadsCall& call) {
    Product queries = product_of(call.query);
    if (call.joined != nullptr) queries.out = call.joined;
    linear({queries, product_of(call.key), product_of(call.value)}, call.x, call.dtype, call.tokens, call.threads);
    const int64_t floats = call.tokens * (call.query.matrix.rows + call.key.matrix.rows);
    parallel_for(call.tokens, threads_for(floats, call.threads), [&](int64_t token, int) {
        if (call.joined != nullptr) part_gates(call, token);
        finish(call, call.query, call.query_rows(), token);
        finish(call, call.key, call.key.matrix.rows, token);
        if (call.cache == nullptr) return;
        append(call, call.key, token, call.key_strides, call.cache[token].keys);
        append(call, call.value, token, call.value_strides, call.cache[token].values);
    });
}

void gated_mlp(const Dense& gate, const Dense& up, const Dense& down, const void* x, DType dtype, int64_t tokens,
               void* out, int threads) {
    const int64_t inner = gate.matrix.rows, bytes = std::min(tokens, kMlpTokens) * inner * item_bytes(dtype);
    Scratch& scratch =
        Scratch::reserve(gated_mlp_scratch_bytes(gate.matrix.rows, dtype, tokens), Scratch::kCaller);
    void *gated = scratch.take<char>(bytes), *upped = scratch.take<char>(bytes);
    for (int64_t first = 0; first < tokens; first += kMlpTokens) {
        const int64_t n = std::min(kMlpTokens, tokens - first);
        linear({{gate.matrix, gate.bias, gated}, {up.matrix, up.bias, upped}},
               element(x, dtype, first * gate.matrix.cols), dtype, n, threads);
        parallel_for(n, threads_for(n * inner, threads), [&](int64_t token, int) {
            swiglu_in_place(dtype, element(gated, dtype, token * inner), element(upped, dtype, token * inner), inner);
        });
        linear({{down.matrix, down.bias, element(out, dtype, first * down.matrix.rows)}}, gated, dtype, n, threads);
    }
}

int64_t gated_mlp_scratch_bytes(int inner, DType dtype, int64_t tokens) {
    return 2 * Scratch::rounded(std::min(tokens, kMlpTokens) * inner * item_bytes(dtype));
}

void add_gated(const void* experts, const void* shared, const void* x, const void* share, DType dtype, int64_t tokens,
               int hidden, void* out, int threads) {
    float memory[kGatedTokens];  // enough for any dtype
    const void* logits = memory;
    for (int64_t first = 0; first < tokens; first += kGatedTokens) {
        const int64_t n = std::min(kGatedTokens, tokens - first);
        if (share != nullptr)
            multiply_few_rows(share, element(x, dtype, first * hidden), dtype, 1, hidden, n, memory, threads);
        parallel_for(n, threads_for(n * hidden, threads), [&](int64_t token, int) {
            const int64_t at = (first + token) * hidden;
            const void *own = element(experts, dtype, at), *other = element(shared, dtype, at);
            if (share == nullptr) add(dtype, own, other, hidden, element(out, dtype, at));
            else add_gated_row(dtype, own, other, element(logits, dtype, token), hidden, element(out, dtype, at));
        });
    }
}

void add_gated_logits(const void* experts, const void* shared, const void* logits, DType dtype, int64_t tokens,
                      int hidden, void* out, int threads) {
    parallel_for(tokens, threads_for(tokens * hidden, threads), [&](int64_t token, int) {
        const int64_t at = token * hidden;
        add_gated_row(dtype, element(experts, dtype, at), element(shared, dtype, at), element(logits, dtype, token),
                      hidden, element(out, dtype, at));
    });
}

void silu_times(void* gate, const void* up, DType dtype, int64_t tokens, int64_t inner, int threads) {
    parallel_for(tokens, threads_for(tokens * inner, threads), [&](int64_t token, int) {
        swiglu_in_place(dtype, element(gate, dtype, token * inner), element(up, dtype, token * inner), inner);
    });
}

void add_values(const void* x, const void* y, DType dtype, int64_t count, void* out) { add(dtype, x, y, count, out); }

}  // namespace fate
