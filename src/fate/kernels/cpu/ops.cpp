#include "ops.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "gate.h"
#include "linear.h"
#include "team.h"

namespace fate {

namespace {

constexpr int kLanes = 16;
constexpr int64_t kMinParallelFloats = 1 << 15;  // numbers that are worth a helper

#define FATE_BODY __attribute__((always_inline))  // of lambdas and templates that are called from a clone

template <typename Type>
FATE_BODY inline float mean_of_squares(const typename Type::Item* x, int n) {
    float lanes[kLanes] = {};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += Type::to_float(x[i + lane]) * Type::to_float(x[i + lane]);
    }
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    for (; i < n; ++i) sum += Type::to_float(x[i]) * Type::to_float(x[i]);
    return sum / static_cast<float>(n);
}

template <typename Type>
FATE_BODY inline void normalize(const Norm& norm, const void* x_row, void* out_row) {
    using Item = typename Type::Item;
    const Item *x = static_cast<const Item*>(x_row), *weight = static_cast<const Item*>(norm.weight);
    Item* out = static_cast<Item*>(out_row);
    const float scale = 1.0f / std::sqrt(mean_of_squares<Type>(x, norm.cols) + norm.eps);
    if (norm.round_before_scale) {
        for (int i = 0; i < norm.cols; ++i) {
            const float rounded = Type::to_float(Type::from_float(Type::to_float(x[i]) * scale));
            out[i] = Type::from_float(Type::to_float(weight[i]) * rounded);
        }
    } else {
        for (int i = 0; i < norm.cols; ++i)
            out[i] = Type::from_float(Type::to_float(weight[i]) * (Type::to_float(x[i]) * scale));
    }
}

// One head of one token, in place. Sums and products are rounded one by one, as torch's operations do.
template <typename Type>
FATE_BODY inline void rotate(void* head, const void* cos_row, const void* sin_row, int dim) {
    using Item = typename Type::Item;
    Item* x = static_cast<Item*>(head);
    const Item *cos = static_cast<const Item*>(cos_row), *sin = static_cast<const Item*>(sin_row);
    const int half = dim / 2;
    const auto round = [](float value) FATE_BODY { return Type::to_float(Type::from_float(value)); };
    for (int i = 0; i < half; ++i) {
        const float first = Type::to_float(x[i]), second = Type::to_float(x[i + half]);
        const float turned = round(-second * Type::to_float(sin[i]));
        const float turned_back = round(first * Type::to_float(sin[i + half]));
        x[i] = Type::from_float(round(first * Type::to_float(cos[i])) + turned);
        x[i + half] = Type::from_float(round(second * Type::to_float(cos[i + half])) + turned_back);
    }
}

FATE_CLONES void normalize_row(const Norm& norm, DType dtype, const void* x, void* out) {
    dispatch(dtype, [&](auto type) FATE_BODY { normalize<decltype(type)>(norm, x, out); });
}

FATE_CLONES void rotate_head(DType dtype, void* head, const void* cos, const void* sin, int dim) {
    dispatch(dtype, [&](auto type) FATE_BODY { rotate<decltype(type)>(head, cos, sin, dim); });
}

FATE_CLONES void silu_times_run(DType dtype, void* gate, const void* up, int64_t count) {
    dispatch(dtype, [&](auto type) FATE_BODY {
        using Type = decltype(type);
        auto* g = static_cast<typename Type::Item*>(gate);
        const auto* u = static_cast<const typename Type::Item*>(up);
        for (int64_t i = 0; i < count; ++i) {
            const float gated = Type::to_float(Type::from_float(silu(Type::to_float(g[i]))));
            g[i] = Type::from_float(gated * Type::to_float(u[i]));
        }
    });
}

FATE_CLONES void add_run(DType dtype, const void* x, const void* y, int64_t count, void* out) {
    dispatch(dtype, [&](auto type) FATE_BODY {
        using Type = decltype(type);
        using Item = typename Type::Item;
        const Item *a = static_cast<const Item*>(x), *b = static_cast<const Item*>(y);
        Item* to = static_cast<Item*>(out);
        for (int64_t i = 0; i < count; ++i) to[i] = Type::from_float(Type::to_float(a[i]) + Type::to_float(b[i]));
    });
}

// out = experts + sigmoid(logit) * shared, each operation rounded.
FATE_CLONES void add_gated_row(DType dtype, const void* experts, const void* shared, const void* logit, int64_t count,
                               void* out) {
    dispatch(dtype, [&](auto type) FATE_BODY {
        using Type = decltype(type);
        using Item = typename Type::Item;
        const Item *x = static_cast<const Item*>(experts), *y = static_cast<const Item*>(shared);
        Item* to = static_cast<Item*>(out);
        const float sigmoid = 1.0f / (1.0f + std::exp(-Type::to_float(*static_cast<const Item*>(logit))));
        const float gate = Type::to_float(Type::from_float(sigmoid));
        for (int64_t i = 0; i < count; ++i) {
            const float gated = Type::to_float(Type::from_float(gate * Type::to_float(y[i])));
            to[i] = Type::from_float(Type::to_float(x[i]) + gated);
        }
    });
}

}  // namespace

void rms_norm(const Norm& norm, const void* x, DType dtype, int64_t rows, void* out, int threads) {
    parallel_for(rows, rows * norm.cols < kMinParallelFloats ? 1 : threads, [&](int64_t row, int) {
        normalize_row(norm, dtype, element(x, dtype, row * norm.cols), element(out, dtype, row * norm.cols));
    });
}

void rotate_heads(const Rotary& rotary, DType dtype, int64_t rows, int64_t heads, int head_dim, void* x) {
    for (int64_t at = 0; at < rows * heads; ++at) {
        const int64_t place = at / heads * rotary.step;
        rotate_head(dtype, element(x, dtype, at * head_dim), element(rotary.cos, dtype, place),
                    element(rotary.sin, dtype, place), rotary.dim);
    }
}

void gated_mlp(const Matrix& gate, const Matrix& up, const Matrix& down, const void* x, DType dtype, int64_t tokens,
               void* out, int threads) {
    const int64_t count = tokens * gate.rows;
    std::vector<float> memory(2 * count);  // enough for any dtype
    void *gated = memory.data(), *upped = memory.data() + count;
    linear({{gate, nullptr, gated}, {up, nullptr, upped}}, x, dtype, tokens, threads);
    silu_times(gated, upped, dtype, count, threads);
    linear({{down, nullptr, out}}, gated, dtype, tokens, threads);
}

void silu_times(void* gate, const void* up, DType dtype, int64_t count, int threads) {
    const int64_t pieces = (count + kMinParallelFloats - 1) / kMinParallelFloats;
    parallel_for(pieces, threads, [&](int64_t piece, int) {
        const int64_t at = piece * kMinParallelFloats;
        silu_times_run(dtype, element(gate, dtype, at), element(up, dtype, at), std::min(kMinParallelFloats, count - at));
    });
}

void add_gated(const void* experts, const void* shared, const void* logits, DType dtype, int64_t tokens, int hidden,
               void* out, int threads) {
    parallel_for(tokens, tokens * hidden < kMinParallelFloats ? 1 : threads, [&](int64_t token, int) {
        const int64_t at = token * hidden;
        add_gated_row(dtype, element(experts, dtype, at), element(shared, dtype, at), element(logits, dtype, token),
                      hidden, element(out, dtype, at));
    });
}

void add_values(const void* x, const void* y, DType dtype, int64_t count, void* out) {
    add_run(dtype, x, y, count, out);
}

}  // namespace fate
