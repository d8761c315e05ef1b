#include "decode.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "activations.h"
#include "gate.h"
#include "linear.h"
#include "rows.h"

namespace fate {

namespace {

// Heads [rows, kv_heads, dim] -> each row's last position in its cache.
void append(const void* heads, const KVRow* kv, bool values, int64_t rows, int64_t kv_heads, int dim,
            CacheStrides strides, DType dtype) {
    for (int64_t at = 0; at < rows * kv_heads; ++at) {
        const KVRow& row = kv[at / kv_heads];
        const int64_t place = at % kv_heads * strides.head + (row.length - 1) * strides.position;
        std::memcpy(element(values ? row.values : row.keys, dtype, place), element(heads, dtype, at * dim),
                    dim * item_bytes(dtype));
    }
}

void normalize_heads(const Norm& norm, DType dtype, int64_t values, void* x) {
    if (norm.weight != nullptr) rms_norm(norm, x, dtype, values / norm.cols, x, 1);
}

}  // namespace

Routed group(Buffers& buffers, int64_t rows, int ranks, int experts, const int64_t* indices, const void* weights,
             DType weights_dtype) {
    buffers.ranks = ranks;
    buffers.weights.resize(rows * ranks);
    load_floats(weights, weights_dtype, rows * ranks, buffers.weights.data());
    buffers.first.assign(experts + 1, 0);
    for (int64_t pair = 0; pair < rows * ranks; ++pair) {
        const bool valid = indices[pair] >= 0 && indices[pair] < experts;
        if (!valid) buffers.weights[pair] = 0.0f;
        if (buffers.weights[pair] != 0.0f) ++buffers.first[indices[pair] + 1];
    }
    std::partial_sum(buffers.first.begin(), buffers.first.end(), buffers.first.begin());
    buffers.pairs.resize(2 * buffers.first[experts]);
    std::vector<int32_t> next(buffers.first.begin(), buffers.first.end() - 1);
    Routed routed;
    for (int64_t pair = 0; pair < rows * ranks; ++pair) {
        if (buffers.weights[pair] == 0.0f) continue;
        const int32_t at = next[indices[pair]]++;
        buffers.pairs[2 * at] = static_cast<int32_t>(pair / ranks);
        buffers.pairs[2 * at + 1] = static_cast<int32_t>(pair % ranks);
    }
    for (int expert = 0; expert < experts; ++expert) {
        if (buffers.first[expert + 1] > buffers.first[expert]) routed.experts.push_back(expert);
    }
    const auto count = [&](int expert) { return buffers.first[expert + 1] - buffers.first[expert]; };
    std::stable_sort(routed.experts.begin(), routed.experts.end(), [&](int a, int b) { return count(a) > count(b); });
    for (const int expert : routed.experts) {
        float sum = 0.0f;
        for (int32_t at = buffers.first[expert]; at < buffers.first[expert + 1]; ++at)
            sum += buffers.weights[buffers.pairs[2 * at] * ranks + buffers.pairs[2 * at + 1]];
        routed.pairs.push_back(count(expert));
        routed.weights.push_back(sum);
    }
    return routed;
}

Routed route_buffers(const Router& router, Buffers& buffers, int64_t rows, int threads) {
    route(router.weight, buffers.normed, buffers.dtype, router.experts, buffers.hidden, rows,
          {buffers.logits, buffers.scores, router.score_dtype, buffers.indices, router.top_k, router.renormalize},
          threads);
    return group(buffers, rows, router.top_k, router.experts, buffers.indices, buffers.scores, router.score_dtype);
}

void attend_half(const AttentionHalf& half, Buffers& buffers, const void* x, int64_t rows, const Rotary& rotary,
                 const KVRow* kv, CacheStrides key_strides, CacheStrides value_strides, int threads) {
    const DType dtype = half.dtype;
    const int64_t hidden = rows * buffers.hidden;
    const int64_t queries = rows * half.query.matrix.rows, keys = rows * half.key.matrix.rows;
    std::vector<float> memory(hidden + 2 * queries + 2 * keys);  // enough for any dtype
    float *normed = memory.data(), *query = normed + hidden, *heads = query + queries, *key = heads + queries;
    float* value = key + keys;
    rms_norm(half.input_norm, x, dtype, rows, normed, threads);
    linear({{half.query.matrix, half.query.bias, query},
            {half.key.matrix, half.key.bias, key},
            {half.value.matrix, half.value.bias, value}},
           normed, dtype, rows, threads);
    normalize_heads(half.query_norm, dtype, queries, query);
    normalize_heads(half.key_norm, dtype, keys, key);
    rotate_heads(rotary, dtype, rows, half.heads(), half.head_dim, query);
    rotate_heads(rotary, dtype, rows, half.kv_heads(), half.head_dim, key);
    append(key, kv, false, rows, half.kv_heads(), half.head_dim, key_strides, dtype);
    append(value, kv, true, rows, half.kv_heads(), half.head_dim, value_strides, dtype);
    attend({query, kv, key_strides, value_strides, dtype, rows, half.heads(), half.kv_heads(), half.head_dim,
            half.head_dim, half.scale, heads, threads});
    linear({{half.output.matrix, half.output.bias, normed}}, heads, dtype, rows, threads);
    add_values(x, normed, dtype, hidden, buffers.residual);
    rms_norm(half.post_norm, buffers.residual, dtype, rows, buffers.normed, threads);
}

void run_experts(const ExpertHalf& half, Buffers& buffers, int64_t rows, const std::vector<Resident>& experts,
                 bool first, bool last, bool add_residual, void* out, int threads) {
    if (!experts.empty()) {
        std::vector<ExpertWork> work;
        std::vector<int32_t> pairs;  // of these experts, one after the other
        for (const Resident& resident : experts) {
            const int32_t from = buffers.first[resident.expert], to = buffers.first[resident.expert + 1];
            work.push_back({half.pool + resident.slot * half.slot_bytes, resident.prefix_only,
                            static_cast<int64_t>(pairs.size() / 2), to - from, resident.expert});
            pairs.insert(pairs.end(), buffers.pairs.begin() + 2 * from, buffers.pairs.begin() + 2 * to);
        }
        fate::experts({&half.record, buffers.normed, half.dtype, rows, pairs.data(), buffers.pair_rows, buffers.ranks,
                       threads, half.activation, half.up_bias, half.down_bias, half.bias_dtype},
                      work.data(), static_cast<int>(work.size()));
    }
    const SharedExpert& shared = half.shared;
    if (first && half.has_shared)
        gated_mlp(shared.gate, shared.up, shared.down, buffers.normed, half.dtype, rows, buffers.shared, threads);
    if (!last) return;
    reduce_rows(buffers.pair_rows, buffers.weights.data(), DType::kFloat32, rows, buffers.ranks, half.hidden,
                half.dtype, out, threads);
    if (half.has_shared && shared.share != nullptr) {
        std::vector<float> logits(rows);  // enough for any dtype
        multiply_few_rows(shared.share, buffers.normed, half.dtype, 1, half.hidden, rows, logits.data(), threads);
        add_gated(out, buffers.shared, logits.data(), half.dtype, rows, half.hidden, out, threads);
    } else if (half.has_shared) {
        add_values(out, buffers.shared, half.dtype, rows * half.hidden, out);
    }
    if (add_residual) add_values(buffers.residual, out, half.dtype, rows * half.hidden, out);
}

}  // namespace fate
