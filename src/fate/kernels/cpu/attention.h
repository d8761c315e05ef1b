// Attention of one new token of each sequence over its KV cache: softmax(scale * q k^T) v, in float32 whatever the cache
// holds.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace fate {

// Elements from one head and position to the next; within a position they are contiguous.
struct CacheStrides {
    int64_t head, position;
};

// One sequence's cache: where head 0, position 0 is. The new token attends to positions [start, length).
struct KVRow {
    void *keys, *values;
    int64_t start, length;
};

struct AttentionCall {
    const void* q;    // [rows, heads, key_dim], contiguous
    const KVRow* kv;  // [rows]
    CacheStrides key_strides, value_strides;
    DType dtype;  // of q, keys, values and out
    int64_t rows, heads, kv_heads;
    int key_dim, value_dim;
    float scale;
    void* out;  // [rows, heads, value_dim], contiguous
    int threads;
};

// Query head h reads the keys and values of head h / (heads / kv_heads). A row's result depends on nothing but the row.
void attend(const AttentionCall& call);

}  // namespace fate
