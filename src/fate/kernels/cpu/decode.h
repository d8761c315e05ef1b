// A decoder layer of a few rows, each a new token of its own sequence, in two calls: attention and routing; experts and
// sum. Between them the caller brings the experts that were chosen into memory. What the functions joined give, bit for
// bit, whatever rows share a call and in whatever groups the experts arrive.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "expert_activation.h"
#include "layout.h"
#include "numeric.h"
#include "ops.h"

namespace fate {

// What routing says of all rows: distinct experts, the most pairs first, of equals the lower number.
struct Routed {
    std::vector<int> experts, pairs;
    std::vector<float> weights;  // sum over an expert's pairs
};

// Memory between the two calls, one for all layers. Pointers are the caller's.
struct Buffers {
    int64_t rows;  // at most
    int hidden, top_k, experts;
    DType dtype;
    void *residual, *normed;  // [rows, hidden]: x + attention, and the block's input
    void* shared;             // [rows, hidden]: what the shared expert gave
    void* logits;             // [rows, experts], of `dtype`
    void* scores;             // [rows, top_k], enough for float32
    int64_t* indices;         // [rows, top_k]
    float* pair_rows;         // [rows, top_k, hidden]: an expert's output for a row
    // Set by `group`: ranks of a row in this layer; weights [rows, ranks], zero where nobody computes; pairs of (row,
    // rank) sorted by expert, and where each expert's begin.
    int ranks = 0;
    std::vector<float> weights;
    std::vector<int32_t> pairs, first;
};

// Group rows by expert. indices and weights [rows, ranks]; pairs of weight zero, and those whose index is no expert's,
// are dropped.
Routed group(Buffers& buffers, int64_t rows, int ranks, int experts, const int64_t* indices, const void* weights,
             DType weights_dtype);

struct Router {
    const void* weight;  // [experts, hidden], of the activations' dtype
    int experts, top_k;
    bool renormalize;
    DType score_dtype;
};

// Route buffers.normed.
Routed route_buffers(const Router& router, Buffers& buffers, int64_t rows, int threads);

// The first call of a layer: residual = x + attention of input_norm(x), normed = post_norm of that.
struct AttentionHalf {
    Norm input_norm, post_norm;  // over all of `hidden`
    Linear query, key, value, output;
    Norm query_norm, key_norm;  // over each head, or over all of them; weight null: none
    int head_dim;
    float scale;
    DType dtype;

    int64_t heads() const { return query.matrix.rows / head_dim; }
    int64_t kv_heads() const { return key.matrix.rows / head_dim; }
};

// x [rows, hidden]; each row's keys and values are written at position length - 1 of its cache.
void attend_half(const AttentionHalf& half, Buffers& buffers, const void* x, int64_t rows, const Rotary& rotary,
                 const KVRow* kv, CacheStrides key_strides, CacheStrides value_strides, int threads);

// An MLP that every row passes: its output counts sigmoid(x . share) times, or once where share is null.
struct SharedExpert {
    Matrix gate, up, down;
    const void* share;  // [hidden]
};

// The second call of a layer, or one of several, as experts arrive.
struct ExpertHalf {
    Record record;
    ExpertActivation activation;
    const void *up_bias, *down_bias;  // [experts, rows] or null
    DType bias_dtype;
    int64_t bias_experts;
    bool has_shared;
    SharedExpert shared;
    const uint8_t* pool;
    int64_t slot_bytes, num_slots;
    int hidden;
    DType dtype;
};

struct Resident {
    int expert;
    int64_t slot;
    bool prefix_only;
};

// first: the shared expert is computed too. last: rows are summed in rank order, the shared expert's output is added,
// and buffers.residual if add_residual -> out [rows, hidden].
void run_experts(const ExpertHalf& half, Buffers& buffers, int64_t rows, const std::vector<Resident>& experts,
                 bool first, bool last, bool add_residual, void* out, int threads);

}  // namespace fate
