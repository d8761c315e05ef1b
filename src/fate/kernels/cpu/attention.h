// Attention of new tokens, each over the KV cache of its own sequence: softmax(scale * q k^T) v, in float32 whatever the
// cache holds.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace fate {

// Elements from one key-value head and position to the next; within a position they are contiguous.
struct CacheStrides {
    int64_t head, position;
};

// Where a row's keys and values are: those of head 0 at the first position it attends to, and how many positions follow
// from there, the row's own included.
struct CacheRow {
    void *keys, *values;
    int64_t length;
};

struct AttentionCall {
    const void* q;          // [rows, heads, key_dim], contiguous
    const CacheRow* cache;  // [rows]
    CacheStrides key_strides, value_strides;
    DType dtype;  // of keys, values, and, unless the call is latent, of q and out
    int64_t rows, heads, kv_heads;
    int key_dim, value_dim;
    float scale;
    void* out;  // [rows, heads, value_dim], contiguous
    int threads;
    // [heads] or null: a score of each head that counts in its softmax and has no value.
    const float* sinks = nullptr;
    // Of latent attention, null otherwise: queries [rows, heads, turned_dim] of `dtype`. A position's keys are then its
    // values too, q and out are float32, and a score also counts the product of these queries with what `values` of the
    // cache points to, [turned_dim] a position.
    const void* turned = nullptr;
    int turned_dim = 0;
};

// Query head h reads the keys and values of head h / (heads / kv_heads). A row's result depends on nothing but the row:
// its positions are cut into blocks by their number alone, and blocks are joined in order.
void attend(const AttentionCall& call);

// The most bytes of scratch of any call whose heads have at least 8 elements each, and at most `widest` together.
int64_t most_attention_scratch_bytes(int64_t widest, int threads);

}  // namespace fate
