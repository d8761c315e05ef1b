#include "block.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <stdexcept>

#include "activations.h"
#include "fused.h"
#include "gate.h"
#include "linear.h"
#include "rows.h"

namespace fate {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// An expert chosen, and its rank.
struct Chosen {
    int expert;
    int32_t rank;
};

// Of an expert that is in memory its record, otherwise null.
const uint8_t* record_of(const SparseBlock& block, int expert) {
    const int64_t slot = expert < block.known ? block.slots[expert] : -1;
    if (slot < 0) return nullptr;
    if (slot >= block.num_slots) throw std::out_of_range("a slot lies outside of the pool");
    return block.pool + slot * block.slot_bytes;
}

void compute(const SparseBlock& block, const std::vector<Chosen>& chosen, const std::vector<ExpertWork>& work,
             float* rows) {
    std::vector<int32_t> pairs;
    for (const Chosen& one : chosen) pairs.insert(pairs.end(), {0, one.rank});
    experts({block.record, block.x, block.dtype, 1, pairs.data(), rows, block.router.top_k, block.threads,
             block.activation},
            work.data(), static_cast<int>(work.size()));
}

void add_shared(const SparseBlock& block) {
    const SharedExpert& shared = *block.shared;
    std::vector<float> given(block.router.hidden);  // enough for any dtype
    gated_mlp(shared.gate, shared.up, shared.down, block.x, block.dtype, 1, given.data(), block.threads);
    add_gated(block.out, given.data(), block.x, shared.share, block.dtype, 1, block.router.hidden, block.out,
              block.threads);
}

}  // namespace

BlockRun sparse_block(const SparseBlock& block) {
    const Clock::time_point start = Clock::now();
    const int top_k = block.router.top_k, hidden = block.router.hidden;
    std::vector<float> logits(block.router.experts), scores(top_k), weights(top_k);  // enough for any dtype
    std::vector<int64_t> indices(top_k);
    route(block.router, block.x, block.dtype, 1, {logits.data(), scores.data(), indices.data()}, block.threads);
    load_floats(scores.data(), block.router.score_dtype, top_k, weights.data());
    std::vector<Chosen> chosen;
    for (int rank = 0; rank < top_k; ++rank) {
        if (weights[rank] != 0.0f) chosen.push_back({static_cast<int>(indices[rank]), rank});
    }
    std::sort(chosen.begin(), chosen.end(), [](const Chosen& a, const Chosen& b) { return a.expert < b.expert; });
    BlockRun run{true, {}, 0.0, 0.0, 0.0};
    std::vector<ExpertWork> work;
    for (const Chosen& one : chosen) {
        const uint8_t* record = record_of(block, one.expert);
        if (record == nullptr) return {false, {}, 0.0, 0.0, 0.0};
        run.experts.push_back(one.expert);
        work.push_back({record, false, static_cast<int64_t>(work.size()), 1});
    }
    run.routed_s = seconds_since(start);
    const auto rows = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(top_k) * hidden);
    compute(block, chosen, work, rows.get());
    run.computed_s = seconds_since(start);
    reduce_rows(rows.get(), scores.data(), block.router.score_dtype, 1, top_k, hidden, block.dtype, block.out,
                block.threads);
    run.summed_s = seconds_since(start);
    if (block.shared != nullptr) add_shared(block);
    return run;
}

BlockRun decoder_layer(const AttentionHalf& half, const AttentionStep& step, SparseBlock block, void* out) {
    const Clock::time_point start = Clock::now();
    attention_half(half, step);
    const double half_s = seconds_since(start);
    std::vector<float> given(half.hidden());  // enough for any dtype
    block.x = step.normed;
    block.out = given.data();
    BlockRun run = sparse_block(block);
    if (!run.whole) return run;
    add_values(step.residual, given.data(), block.dtype, half.hidden(), out);
    for (double* seconds : {&run.routed_s, &run.computed_s, &run.summed_s}) *seconds += half_s;
    return run;
}

}  // namespace fate
