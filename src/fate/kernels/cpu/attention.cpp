#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "activations.h"
#include "scratch.h"
#include "team.h"
#include "tiles.h"

namespace fate {

namespace {

constexpr int64_t kMinParallelWork = 1 << 15;  // multiplications that are worth a helper
constexpr int64_t kStep = 256;                 // positions whose scores are kept at a time; divides a block
constexpr int64_t kMaxBlocks = 32;             // of one row
constexpr int64_t kMaxHeads = 16;              // query heads that read a key-value head together
constexpr int64_t kWaveFloats = 1 << 18;       // of blocks' results that are kept at a time, unless one group needs more

// Positions of a block of a row of `length` positions.
int64_t block_positions(int64_t length) {
    return (length + kStep * kMaxBlocks - 1) / (kStep * kMaxBlocks) * kStep;
}

int64_t blocks_of(int64_t length) {
    const int64_t each = block_positions(length);
    return (length + each - 1) / each;
}

const void* element(const void* base, DType dtype, int64_t index) {
    return static_cast<const char*>(base) + index * item_bytes(dtype);
}

// Query heads of one row that share a key-value head.
struct Group {
    int64_t row, kv_head, first_head;
    int heads;
};

// What a block gives of a group: sum over its positions of exp(score - top) times the value, [heads, value_dim]; the
// largest score, and the sum of exp(score - top), [heads] each.
struct BlockSums {
    float *values, *tops, *totals;
};

// scores [count] times scale; returns the largest of them and `top`.
FATE_CLONES float scale_scores(float* scores, int64_t count, float scale, float top) {
    float lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = top;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const float score = scores[i + lane] * scale;
            scores[i + lane] = score;
            lanes[lane] = score > lanes[lane] ? score : lanes[lane];
        }
    }
    for (; i < count; ++i) {
        const float score = scores[i] * scale;
        scores[i] = score;
        lanes[0] = score > lanes[0] ? score : lanes[0];
    }
    return *std::max_element(lanes, lanes + kLanes);
}

__attribute__((always_inline)) inline float exp_of(float x) {
    const float power = exp2_clamped(x * kLog2E);
    return x == x ? power : x;
}

// scores [count] -> exp(score - top); returns their sum.
FATE_CLONES float exponentiate(float* scores, int64_t count, float top) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const float power = exp_of(scores[i + lane] - top);
            scores[i + lane] = power;
            lanes[lane] += power;
        }
    }
    for (; i < count; ++i) lanes[0] += scores[i] = exp_of(scores[i] - top);
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    return sum;
}

FATE_CLONES void multiply_by(float factor, float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

FATE_CLONES void add_times(float factor, const float* values, int64_t count, float* sum) {
    for (int64_t i = 0; i < count; ++i) sum[i] += factor * values[i];
}

class Attention {
  public:
    explicit Attention(const AttentionCall& call)
        : call_(call),
          per_kv_head_(call.heads / call.kv_heads),
          parts_((per_kv_head_ + kMaxHeads - 1) / kMaxHeads),
          widest_(static_cast<int>(std::min(per_kv_head_, kMaxHeads))) {}

    void run() {
        int64_t positions = 0;
        for (int64_t row = 0; row < call_.rows; ++row) positions += call_.cache[row].length;
        const int threads =
            positions * call_.heads * (call_.key_dim + call_.value_dim) < kMinParallelWork ? 1 : call_.threads;
        const int64_t groups = call_.rows * call_.kv_heads * parts_;
        for (int64_t first = 0, end; first < groups; first = end) {
            int64_t blocks = 0;  // most of any group from `first` to `end`
            for (end = first; end < groups; ++end) {
                const int64_t most = std::max(blocks, blocks_of(call_.cache[group(end).row].length));
                if (end > first && (end + 1 - first) * most * sums_floats() > kWaveFloats) break;
                blocks = most;
            }
            wave(first, end - first, blocks, threads);
        }
    }

    // Of a wave of `groups` groups of at most `blocks` blocks each.
    int64_t scratch_bytes(int64_t groups, int64_t blocks, int threads) const {
        return Scratch::bytes_of<std::atomic<int>>(groups) + Scratch::bytes_of<float>(groups * blocks * sums_floats()) +
               Scratch::bytes_of<float>(threads * thread_floats());
    }

  private:
    int64_t sums_floats() const { return widest_ * (static_cast<int64_t>(call_.value_dim) + 2); }
    int64_t thread_floats() const {
        const int64_t latent = call_.turned != nullptr ? call_.turned_dim + kStep : 0;
        const int64_t floats = widest_ * std::max<int64_t>(call_.key_dim + kStep + latent, call_.value_dim);
        return (floats + kLanes - 1) / kLanes * kLanes;
    }

    Group group(int64_t index) const {
        const int64_t part = index % parts_, kv_head = index / parts_ % call_.kv_heads;
        const int64_t first = per_kv_head_ * part / parts_, end = per_kv_head_ * (part + 1) / parts_;
        return {index / parts_ / call_.kv_heads, kv_head, kv_head * per_kv_head_ + first,
                static_cast<int>(end - first)};
    }

    void wave(int64_t first, int64_t groups, int64_t blocks, int threads) const {
        Scratch& scratch = Scratch::reserve(scratch_bytes(groups, blocks, threads));
        std::atomic<int>* left = scratch.take<std::atomic<int>>(groups);
        float* sums = scratch.take<float>(groups * blocks * sums_floats());
        float* memory = scratch.take<float>(threads * thread_floats());
        for (int64_t g = 0; g < groups; ++g) {
            new (left + g) std::atomic<int>(static_cast<int>(blocks_of(call_.cache[group(first + g).row].length)));
        }
        parallel_for(groups * blocks, threads, [&](int64_t item, int thread) {
            const int64_t at = item / blocks, block = item % blocks;
            const Group own = group(first + at);
            const int64_t count = blocks_of(call_.cache[own.row].length);
            if (block >= count) return;
            float *own_sums = sums + at * blocks * sums_floats(), *own_memory = memory + thread * thread_floats();
            attend_block(own, block, own_memory, sums_of(own_sums, block));
            if (left[at].fetch_sub(1, std::memory_order_acq_rel) == 1) join(own, count, own_sums, own_memory);
        });
    }

    BlockSums sums_of(float* sums, int64_t block) const {
        float* values = sums + block * sums_floats();
        return {values, values + widest_ * static_cast<int64_t>(call_.value_dim),
                values + widest_ * static_cast<int64_t>(call_.value_dim + 1)};
    }

    void attend_block(const Group& own, int64_t block, float* memory, const BlockSums& sums) const {
        const CacheRow& row = call_.cache[own.row];
        const int64_t each = block_positions(row.length), end = std::min(row.length, (block + 1) * each);
        const void* keys = element(row.keys, call_.dtype, own.kv_head * call_.key_strides.head);
        const void* values = element(row.values, call_.dtype, own.kv_head * call_.value_strides.head);
        const bool latent = call_.turned != nullptr;
        const DType given = latent ? DType::kFloat32 : call_.dtype;
        const int64_t first_head = own.row * call_.heads + own.first_head;
        float *scores = memory, *q = memory + own.heads * kStep;
        float *turned = q + own.heads * call_.key_dim, *turned_scores = turned + own.heads * call_.turned_dim;
        load_floats(element(call_.q, given, first_head * call_.key_dim), given,
                    static_cast<int64_t>(own.heads) * call_.key_dim, q);
        if (latent) {
            load_floats(element(call_.turned, call_.dtype, first_head * call_.turned_dim), call_.dtype,
                        static_cast<int64_t>(own.heads) * call_.turned_dim, turned);
        }
        std::fill_n(sums.values, static_cast<int64_t>(own.heads) * call_.value_dim, 0.0f);
        std::fill_n(sums.tops, own.heads, -std::numeric_limits<float>::infinity());
        std::fill_n(sums.totals, own.heads, 0.0f);
        for (int64_t at = block * each; at < end; at += kStep) {
            const int64_t count = std::min(kStep, end - at);
            tile_kernels().dot_rows(q, own.heads, element(keys, call_.dtype, at * call_.key_strides.position),
                                    call_.dtype, call_.key_strides.position, count, call_.key_dim, scores, kStep);
            if (latent) {
                tile_kernels().dot_rows(turned, own.heads,
                                        element(values, call_.dtype, at * call_.value_strides.position), call_.dtype,
                                        call_.value_strides.position, count, call_.turned_dim, turned_scores, kStep);
                for (int head = 0; head < own.heads; ++head) {
                    add_times(1.0f, turned_scores + head * kStep, count, scores + head * kStep);
                }
            }
            const CacheStrides& strides = latent ? call_.key_strides : call_.value_strides;
            const void* weighed = element(latent ? keys : values, call_.dtype, at * strides.position);
            for (int head = 0; head < own.heads; ++head) weigh(head, scores + head * kStep, count, sums);
            tile_kernels().add_rows(scores, kStep, own.heads, weighed, call_.dtype, strides.position, count,
                                    call_.value_dim, sums.values);
        }
    }

    // Scores -> weights relative to the largest score so far, which what was summed before is made relative to.
    void weigh(int head, float* scores, int64_t count, const BlockSums& sums) const {
        const float before = sums.tops[head], top = scale_scores(scores, count, call_.scale, before);
        const float factor = exp_of(before - top);
        sums.tops[head] = top;
        sums.totals[head] = sums.totals[head] * factor + exponentiate(scores, count, top);
        if (top > before) multiply_by(factor, sums.values + static_cast<int64_t>(head) * call_.value_dim, call_.value_dim);
    }

    // The blocks' sums -> what the group's heads give; `memory`: [value_dim].
    void join(const Group& own, int64_t blocks, float* sums, float* memory) const {
        const int64_t dim = call_.value_dim;
        for (int head = 0; head < own.heads; ++head) {
            float top = sums_of(sums, 0).tops[head], total = 0.0f;
            for (int64_t b = 1; b < blocks; ++b) top = std::max(top, sums_of(sums, b).tops[head]);
            if (call_.sinks != nullptr) {
                const float sink = call_.sinks[own.first_head + head];
                top = std::max(top, sink);
                total = exp_of(sink - top);
            }
            std::fill_n(memory, dim, 0.0f);
            for (int64_t b = 0; b < blocks; ++b) {
                const BlockSums block = sums_of(sums, b);
                const float factor = exp_of(block.tops[head] - top);
                total += factor * block.totals[head];
                add_times(factor, block.values + head * dim, dim, memory);
            }
            multiply_by(1.0f / total, memory, dim);
            const int64_t at = (own.row * call_.heads + own.first_head + head) * dim;
            const DType given = call_.turned != nullptr ? DType::kFloat32 : call_.dtype;
            store_floats(memory, dim, given, static_cast<char*>(call_.out) + at * item_bytes(given));
        }
    }

    const AttentionCall& call_;
    int64_t per_kv_head_, parts_;  // a key-value head's query heads, and the groups they are in
    int widest_;                   // heads of the largest group
};

}  // namespace

void attend(const AttentionCall& call) { Attention(call).run(); }

int64_t most_attention_scratch_bytes(int64_t widest, int threads) {
    constexpr int64_t kFewestFloats = 10;  // of a block's sums: a head of 8 elements
    const int64_t block = widest + 2 * kMaxHeads, thread = 2 * (widest + kMaxHeads * kStep) + kLanes;
    return Scratch::bytes_of<std::atomic<int>>(kWaveFloats / kFewestFloats) +
           Scratch::bytes_of<float>(std::max(kWaveFloats, kMaxBlocks * block)) +
           Scratch::bytes_of<float>(threads * thread);
}

}  // namespace fate
