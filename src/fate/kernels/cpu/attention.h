// Attention of one new token over a KV cache: softmax(scale * q k^T) v, in float32 whatever the cache holds.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace fate {

// Elements from one batch entry, head and position to the next; within a position they are contiguous.
struct CacheStrides {
    int64_t batch, head, position;
};

struct AttentionCall {
    const void* q;  // [batch, heads, key_dim], contiguous
    const void* keys;
    const void* values;
    CacheStrides key_strides, value_strides;
    DType dtype;  // of q, keys, values and out
    int64_t batch, heads, kv_heads, length;
    int key_dim, value_dim;
    float scale;
    void* out;  // [batch, heads, value_dim], contiguous
    int threads;
};

// Query head h reads the keys and values of head h / (heads / kv_heads).
void attend(const AttentionCall& call);

}  // namespace fate
