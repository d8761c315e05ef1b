// A layer's small operations, in one call each: what torch does in a dozen operations of some microseconds. Roundings
// to `dtype` fall where the model's own operations round, so that results agree. A row's result depends on nothing but
// the row.
#pragma once

#include <cstdint>

#include "attention.h"
#include "layout.h"
#include "numeric.h"

namespace fate {

// A packed matrix and its bias [rows], or null, of the activations' dtype.
struct Dense {
    Matrix matrix;
    const void* bias = nullptr;
};

// weight * x / sqrt(mean(x^2) + eps). round_before_scale: x is rounded to `dtype` before it is multiplied by the weight.
// plus_one: 1 + weight is what it is multiplied by.
struct Norm {
    const void* weight;  // [cols], of `dtype`; null: none
    int cols;
    float eps;
    bool round_before_scale;
    bool plus_one = false;
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

// How a rotation pairs the elements of a head, and what its angles are.
enum class Rotation {
    kHalves,          // element i with i + dim / 2; cos and sin [dim]
    kHalvesOnce,      // the same; cos and sin [dim / 2]
    kPairsToHalves,   // element 2i with 2i + 1, which then are i and i + dim / 2; cos and sin [dim], of which half is read
    kPairs,           // element 2i with 2i + 1; cos: float32 pairs (cos, sin) [dim / 2]
};

// Rotates the first `dim` elements of a head. cos and sin: a row for each token, `step` elements apart, or one for all
// (step 0).
struct Rotary {
    const void *cos, *sin;
    int dim, step;
    Rotation kind = Rotation::kHalves;
};

// One head's elements, in place.
void rotate_head(const Rotary& rotary, int64_t token, DType dtype, void* head);

struct HeadsCall {
    Projection query, key, value;
    Rotary rotary;
    const void* x;  // [tokens, hidden]
    DType dtype;
    int64_t tokens;
    int head_dim;
    int threads;
    // Null, or where keys and values go too: each token's to the last position of its row.
    const CacheRow* cache = nullptr;
    CacheStrides key_strides = {}, value_strides = {};
    // Null, or the query matrix gives a gate behind each head's queries: its product [tokens, 2 * heads], and where the
    // gates go, [tokens, heads].
    void *joined = nullptr, *gates = nullptr;

    int64_t query_rows() const { return joined == nullptr ? query.matrix.rows : query.matrix.rows / 2; }
};

// Queries, keys and values of new tokens: product, bias, norm, rotation.
void project_heads(const HeadsCall& call);

// down(silu(gate(x)) * up(x)): x [tokens, hidden] -> out [tokens, hidden], of `dtype`.
void gated_mlp(const Dense& gate, const Dense& up, const Dense& down, const void* x, DType dtype, int64_t tokens,
               void* out, int threads);

// Bytes of scratch that it takes beside its products'.
int64_t gated_mlp_scratch_bytes(int inner, DType dtype, int64_t tokens);

// experts + sigmoid(x . share) * shared, all [tokens, hidden], share [hidden] (null: experts + shared) -> out, which may
// be one of them.
void add_gated(const void* experts, const void* shared, const void* x, const void* share, DType dtype, int64_t tokens,
               int hidden, void* out, int threads);

// The same with the gate's logits [tokens], of `dtype`.
void add_gated_logits(const void* experts, const void* shared, const void* logits, DType dtype, int64_t tokens,
                      int hidden, void* out, int threads);

// x * sigmoid(gates), all [count] -> x.
void multiply_by_gates(void* x, const void* gates, DType dtype, int64_t count);

// silu(gate) * up, both [tokens, inner] -> gate.
void silu_times(void* gate, const void* up, DType dtype, int64_t tokens, int64_t inner, int threads);

// x + y, both [count] -> out; of `dtype`.
void add_values(const void* x, const void* y, DType dtype, int64_t count, void* out);

}  // namespace fate
