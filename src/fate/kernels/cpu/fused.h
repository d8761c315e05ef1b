// A few tokens' way through a layer's small operations, in one call each: what torch does in a dozen operations of some
// microseconds. Roundings to `dtype` fall where the model's own operations round, so that results agree.
#pragma once

#include <cstdint>

#include "attention.h"
#include "layout.h"
#include "numeric.h"

namespace fate {

// weight * x / sqrt(mean(x^2) + eps). rounds_first: x is rounded to `dtype` before it is multiplied by the weight.
struct Norm {
    const void* weight;  // [cols], of `dtype`; null: none
    int cols;
    float eps;
    bool rounds_first;
};

// x [rows, cols] -> out, which may be x; of `dtype`, contiguous.
void rms_norm(const Norm& norm, const void* x, DType dtype, int64_t rows, void* out, int threads);

// A matrix and where its product goes.
struct Projection {
    Matrix matrix;
    const void* bias;  // [rows] or null
    Norm norm;         // of each head, or of all of them; only of queries and keys
    void* out;         // [tokens, rows]
};

// cos and sin [tokens, dim], or [1, dim] for all tokens (step 0): rotates the first `dim` elements of a head, in halves.
struct Rotary {
    const void *cos, *sin;
    int dim, step;
};

struct HeadsCall {
    Projection query, key, value;
    Rotary rotary;
    const void* x;  // [tokens, hidden]
    DType dtype;
    int64_t tokens;
    int head_dim;
    int threads;
};

// Queries, keys and values of new tokens: product, bias, norm, rotation.
void project_heads(const HeadsCall& call);

// down(silu(gate(x)) * up(x)): x [tokens, hidden] -> out [tokens, hidden], of `dtype`.
void gated_mlp(const Matrix& gate, const Matrix& up, const Matrix& down, const void* x, DType dtype, int64_t tokens,
               void* out, int threads);

// experts + sigmoid(x . weight) * shared, all [tokens, hidden], weight [hidden] -> out, which may be one of them.
void add_gated(const void* experts, const void* shared, const void* x, const void* weight, DType dtype, int64_t tokens,
               int hidden, void* out);

// x + y, both [count] -> out; of `dtype`.
void add_values(const void* x, const void* y, DType dtype, int64_t count, void* out);

// What attention gives of `call`, times the matrix plus bias (or null) -> out [batch, rows]; call.out is set here.
void attend_project(AttentionCall call, const Matrix& matrix, const void* bias, void* out);

// The first half of a decoder layer: residual = x + attention of norm(x), then its norm, which the second half takes.
struct AttentionHalf {
    Norm before, after;       // over all of `hidden`
    HeadsCall heads;          // x: the layer's input; each sequence's one new token
    AttentionCall attention;  // its cache has room for that token's keys and values behind the first `length` - 1
    Matrix output;
    const void* output_bias;  // or null
    void *keys, *values;      // the cache's, to be written
    void *residual, *normed;  // [tokens, hidden]
};

// Sets what is between its steps itself: where queries, keys and values go, and the heads.
void attention_half(AttentionHalf half);

}  // namespace fate
