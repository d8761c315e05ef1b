// One token's way through a sparse block whose experts are in memory (router, experts, their sum and the shared expert)
// and through a decoder layer with such a block, in one call each. What the functions joined give, bit for bit.
#pragma once

#include <cstdint>
#include <vector>

#include "decode.h"
#include "expert_activation.h"
#include "layout.h"
#include "numeric.h"

namespace fate {

struct SparseBlock {
    const void* x;  // [hidden]
    DType dtype;
    Router router;
    const Record* record;  // of an expert, read whole: see linear.h
    ExpertActivation activation;
    const uint8_t* pool;
    int64_t slot_bytes, num_slots;
    const int64_t* slots;  // of the first `known` experts; negative: not in memory
    int64_t known;
    const SharedExpert* shared;  // or null
    void* out;                   // [hidden]
    int threads;
};

struct BlockRun {
    bool whole;                // whether all experts chosen were in memory; otherwise nothing was computed
    std::vector<int> experts;  // those of a weight that is not zero, ascending
    // Seconds since the call began: when these were known, when they were computed, and when they were summed.
    double routed_s, computed_s, summed_s;
};

BlockRun sparse_block(const SparseBlock& block);

// out [hidden] = residual + block of `normed`, both of the first half, which is done whether or not the block is. Sets
// the block's input and output itself; seconds count from the first half's beginning.
BlockRun decoder_layer(const AttentionHalf& half, const AttentionStep& step, SparseBlock block, void* out);

}  // namespace fate
