#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "activations.h"
#include "decode.h"
#include "linear.h"
#include "rows.h"

namespace fate {

namespace {

void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

}  // namespace

DecodeBuffers::DecodeBuffers(int64_t max_rows, int hidden, int64_t max_top_k, int64_t max_experts, DType dtype,
                             const Memory& memory)
    : max_rows_(max_rows),
      max_top_k_(max_top_k),
      max_experts_(max_experts),
      hidden_(hidden),
      dtype_(dtype),
      memory_(memory),
      weights_(max_rows * max_top_k),
      of_expert_(max_experts),
      pairs_(2 * max_rows * max_top_k),
      own_pairs_(2 * max_rows * max_top_k),
      expert_rows_(max_rows * max_top_k * hidden),
      shared_(max_rows * hidden * item_bytes(dtype)) {}

void DecodeBuffers::require_rows(int64_t rows) const {
    if (rows < 1 || rows > max_rows_)
        throw std::invalid_argument(std::to_string(rows) + " rows do not fit: these buffers take 1 to " +
                                    std::to_string(max_rows_));
}

int64_t DecodeBuffers::bytes() const {
    return static_cast<int64_t>((weights_.size() + expert_rows_.size()) * sizeof(float) +
                                (pairs_.size() + own_pairs_.size()) * sizeof(int32_t) +
                                of_expert_.size() * sizeof(Pairs) + shared_.size());
}

void DecodeBuffers::set_normed(const void* x, int64_t rows) {
    require_rows(rows);
    std::memcpy(memory_.normed, x, rows * hidden_ * item_bytes(dtype_));
}

Routed DecodeBuffers::route(const Router& router, int64_t rows, int threads) {
    require_rows(rows);
    require(router.hidden == hidden_ && router.top_k <= max_top_k_ && router.experts <= max_experts_,
            "the router does not fit: buffers need its hidden size, top_k and experts");
    fate::route(router, memory_.normed, dtype_, rows, {memory_.logits, memory_.scores, memory_.indices}, threads);
    load_floats(memory_.scores, router.score_dtype, rows * router.top_k, weights_.data());
    return group(rows, router.top_k, router.experts);
}

Routed DecodeBuffers::choose(const int64_t* indices, const void* weights, DType weights_dtype, int64_t rows,
                             int64_t top_k, int64_t num_experts) {
    require_rows(rows);
    require(top_k >= 1 && top_k <= max_top_k_ && num_experts >= 1 && num_experts <= max_experts_,
            "the routing does not fit: buffers need its top_k and experts");
    std::copy_n(indices, rows * top_k, memory_.indices);
    std::memcpy(memory_.scores, weights, rows * top_k * item_bytes(weights_dtype));
    load_floats(weights, weights_dtype, rows * top_k, weights_.data());
    return group(rows, top_k, num_experts);
}

Routed DecodeBuffers::group(int64_t rows, int64_t top_k, int64_t num_experts) {
    rows_ = rows;
    top_k_ = top_k;
    has_shared_ = false;
    Routed routed;
    std::fill(of_expert_.begin(), of_expert_.end(), Pairs{0, 0, false});
    for (int64_t pair = 0; pair < rows * top_k; ++pair) {
        const int64_t expert = memory_.indices[pair];
        if (expert < 0 || expert >= num_experts) weights_[pair] = 0.0f;
        if (weights_[pair] == 0.0f) continue;
        if (of_expert_[expert].count++ == 0) routed.experts.push_back(static_cast<int>(expert));
    }
    std::sort(routed.experts.begin(), routed.experts.end(), [&](int a, int b) {
        return of_expert_[a].count != of_expert_[b].count ? of_expert_[a].count > of_expert_[b].count : a < b;
    });
    left_ = static_cast<int>(routed.experts.size());
    int first = 0;
    for (const int expert : routed.experts) {
        Pairs& own = of_expert_[expert];
        routed.pairs.push_back(own.count);
        own = {first, 0, true};
        first += routed.pairs.back();
    }
    std::vector<double> weights(num_experts);
    for (int64_t pair = 0; pair < rows * top_k; ++pair) {
        if (weights_[pair] == 0.0f) continue;
        const int64_t expert = memory_.indices[pair];
        Pairs& own = of_expert_[expert];
        int32_t* at = pairs_.data() + 2 * (own.first + own.count++);
        at[0] = static_cast<int32_t>(pair / top_k);
        at[1] = static_cast<int32_t>(pair % top_k);
        weights[expert] += weights_[pair];
    }
    for (const int expert : routed.experts) routed.weights.push_back(weights[expert]);
    return routed;
}

void ExpertHalf::run(DecodeBuffers& buffers, int64_t rows, const Arrived& arrived, bool first, bool last, void* out,
                     bool add_residual, int threads) const {
    buffers.require_rows(rows);
    require(buffers.hidden() == hidden && buffers.dtype() == dtype, "these buffers are of another hidden size or dtype");
    require(rows == buffers.rows_, "these rows were not routed: route them first");
    compute(buffers, arrived, threads);
    if (first && has_shared) {
        gated_mlp(shared.gate, shared.up, shared.down, buffers.normed(), dtype, rows, buffers.shared_.data(), threads);
        buffers.has_shared_ = true;
    }
    if (!last) return;
    require(buffers.left_ == 0, "experts that were chosen are missing: the last call must follow those of all others");
    require(!has_shared || buffers.has_shared_, "the shared expert is missing: no call was the first");
    require(out != nullptr, "the last call needs a place for its output");
    sum_up(buffers, out, add_residual, threads);
}

void ExpertHalf::compute(DecodeBuffers& buffers, const Arrived& arrived, int threads) const {
    if (arrived.count == 0) return;
    std::vector<ExpertWork> work(arrived.count);
    int64_t pairs = 0;
    for (int64_t i = 0; i < arrived.count; ++i) {
        const int64_t expert = arrived.experts[i], slot = arrived.slots[i];
        require(expert >= 0 && expert < static_cast<int64_t>(buffers.of_expert_.size()) &&
                    buffers.of_expert_[expert].left,
                "an expert was not chosen, or is computed already");
        require(slot >= 0 && slot < num_slots, "a slot lies outside of the pool");
        require(up_bias == nullptr || expert < biased, "an expert has no biases");
        const bool prefix_only = arrived.prefix_only != nullptr && arrived.prefix_only[i] != 0;
        require(!prefix_only || !record.int8, "an int8 record cannot be read at INT2: only at FULL");
        const DecodeBuffers::Pairs& own = buffers.of_expert_[expert];
        work[i] = {pool + slot * slot_bytes, prefix_only, pairs, own.count, expert};
        for (int64_t other = 0; other < i; ++other) require(arrived.experts[other] != expert, "an expert is named twice");
        std::copy_n(buffers.pairs_.data() + 2 * own.first, 2 * own.count, buffers.own_pairs_.data() + 2 * pairs);
        pairs += own.count;
    }
    experts({&record, buffers.normed(), dtype, buffers.rows_, buffers.own_pairs_.data(), buffers.expert_rows_.data(),
             buffers.top_k_, threads, activation, up_bias, down_bias, bias_dtype},
            work.data(), static_cast<int>(work.size()));
    for (int64_t i = 0; i < arrived.count; ++i) buffers.of_expert_[arrived.experts[i]].left = false;
    buffers.left_ -= static_cast<int>(arrived.count);
}

void ExpertHalf::sum_up(DecodeBuffers& buffers, void* out, bool add_residual, int threads) const {
    const int64_t rows = buffers.rows_;
    reduce_rows(buffers.expert_rows_.data(), buffers.weights_.data(), DType::kFloat32, rows, buffers.top_k_, hidden,
                dtype, out, threads);
    if (has_shared)
        add_gated(out, buffers.shared_.data(), buffers.normed(), shared.share, dtype, rows, hidden, out, threads);
    if (add_residual) add_values(buffers.residual(), out, dtype, rows * hidden, out);
}

}  // namespace fate
