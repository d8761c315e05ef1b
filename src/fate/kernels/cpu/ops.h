// The small operations of a decoder layer. Roundings to `dtype` fall where torch's own operations round, so that results
// agree with a model's modules. A row's result depends on nothing but the row.
#pragma once

#include <cstdint>

#include "attention.h"
#include "layout.h"
#include "numeric.h"

namespace fate {

static inline void* element(void* base, DType dtype, int64_t index) {
    return static_cast<char*>(base) + index * item_bytes(dtype);
}
static inline const void* element(const void* base, DType dtype, int64_t index) {
    return static_cast<const char*>(base) + index * item_bytes(dtype);
}

// weight * x / sqrt(mean(x^2) + eps). round_before_scale: x is rounded to `dtype` before it is multiplied by the weight.
struct Norm {
    const void* weight;  // [cols], of `dtype`; null: none
    int cols;
    float eps;
    bool round_before_scale;
};

// x [rows, cols] -> out, which may be x; of `dtype`, contiguous.
void rms_norm(const Norm& norm, const void* x, DType dtype, int64_t rows, void* out, int threads);

// A packed matrix and its bias [rows], or null.
struct Linear {
    Matrix matrix;
    const void* bias;
};

// cos and sin [rows, dim], or [1, dim] for all rows (step 0): rotates the first `dim` elements of a head, in halves.
struct Rotary {
    const void *cos, *sin;
    int dim, step;
};

// x [rows, heads, head_dim], in place.
void rotate_heads(const Rotary& rotary, DType dtype, int64_t rows, int64_t heads, int head_dim, void* x);

// down(silu(gate(x)) * up(x)): x [tokens, hidden] -> out [tokens, hidden], of `dtype`.
void gated_mlp(const Matrix& gate, const Matrix& up, const Matrix& down, const void* x, DType dtype, int64_t tokens,
               void* out, int threads);

// silu(gate) * up, both [count] -> gate.
void silu_times(void* gate, const void* up, DType dtype, int64_t count, int threads);

// experts + sigmoid(logits) * shared: [tokens, hidden], logits [tokens] -> out, which may be one of them.
void add_gated(const void* experts, const void* shared, const void* logits, DType dtype, int64_t tokens, int hidden,
               void* out, int threads);

// x + y, both [count] -> out, which may be one of them; of `dtype`.
void add_values(const void* x, const void* y, DType dtype, int64_t count, void* out);

}  // namespace fate
