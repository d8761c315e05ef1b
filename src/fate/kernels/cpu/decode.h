// A decoder layer for a few rows, each the new token of a sequence of its own, in two calls:
//
//   MixerHalf::run   residual = x + mixer(input_norm(x)), normed = post_norm(residual); then the router's choice
//   ExpertHalf::run  the experts chosen, in as many calls as their weights arrive in; the last one sums everything up
//
// DecodeBuffers carry what the second call takes from the first. A row gets the bits that the functions joined here
// (mixer.h, ops.h, gate.h, linear.h, rows.h) give for it alone. What does not fit throws std::invalid_argument.
#pragma once

#include <cstdint>
#include <vector>

#include "expert_activation.h"
#include "gate.h"
#include "layout.h"
#include "mixer.h"
#include "numeric.h"
#include "ops.h"

namespace fate {

struct MixerHalf {
    Norm input_norm, post_norm;  // over all of `hidden`
    const Mixer* mixer;

    // step.x: the layer's input, its out is not read; residual and normed: [rows, hidden].
    void run(MixerStep step, void* residual, void* normed) const;
};

// What the routing of some rows says. Pairs of a row and a rank count that have an expert and a weight other than zero.
struct Routed {
    std::vector<int> experts;     // distinct, those of most pairs first, of equals the lower number
    std::vector<int> pairs;       // of each
    std::vector<double> weights;  // summed over its pairs
};

// What is between the two calls, for up to max_rows rows; reused by every layer.
class DecodeBuffers {
  public:
    // The caller's memory: residual and normed [max_rows, hidden] of `dtype`, logits [max_rows, max_experts] and scores
    // [max_rows, max_top_k] with room for float32, indices of the same shape.
    struct Memory {
        void *residual, *normed, *logits, *scores;
        int64_t* indices;
    };

    DecodeBuffers(int64_t max_rows, int hidden, int64_t max_top_k, int64_t max_experts, DType dtype,
                  const Memory& memory);

    // A router's choice for the rows in `normed`.
    Routed route(const Router& router, int64_t rows, int threads);
    // Another one's: indices and weights [rows, top_k]. An index outside of [0, num_experts) is nobody's.
    Routed choose(const int64_t* indices, const void* weights, DType weights_dtype, int64_t rows, int64_t top_k,
                  int64_t num_experts);
    // x [rows, hidden] -> normed, for a block whose attention is not ours.
    void set_normed(const void* x, int64_t rows);

    void require_rows(int64_t rows) const;
    // Of its own, beside the caller's.
    int64_t bytes() const;
    int hidden() const { return hidden_; }
    DType dtype() const { return dtype_; }
    void* residual() const { return memory_.residual; }
    void* normed() const { return memory_.normed; }

  private:
    friend struct ExpertHalf;

    struct Pairs {
        int first, count;
        bool left;  // to be computed
    };

    Routed group(int64_t rows, int64_t top_k, int64_t num_experts);

    int64_t max_rows_, max_top_k_, max_experts_;
    int hidden_;
    DType dtype_;
    Memory memory_;
    // The last routing.
    int64_t rows_ = 0, top_k_ = 0;
    std::vector<float> weights_;      // [rows, top_k]; zero where the pair does not count
    std::vector<Pairs> of_expert_;    // [max_experts]
    std::vector<int32_t> pairs_;      // (row, rank), expert after expert
    std::vector<int32_t> own_pairs_;  // those of one call
    std::vector<float> expert_rows_;  // [rows, top_k, hidden]
    std::vector<char> shared_;        // [rows, hidden]: what the shared expert gives
    int left_ = 0;                    // experts to be computed
    bool has_shared_ = false;
};

// An MLP that every row passes: its output counts sigmoid(x . share) times, or as it is.
struct SharedExpert {
    Dense gate, up, down;
    const void* share;  // [hidden] or null
};

// Experts that were chosen and arrived: their numbers, the slots of the pool they are in, and whether each is read to
// INT2 depth (null: none is).
struct Arrived {
    const int64_t *experts, *slots;
    const uint8_t* prefix_only;
    int64_t count;
};

struct ExpertHalf {
    Record record;
    ExpertActivation activation;
    const void *up_bias, *down_bias;  // [biased, rows] of bias_dtype, or null
    DType bias_dtype;
    int64_t biased;
    bool has_shared;
    SharedExpert shared;
    const uint8_t* pool;
    int64_t slot_bytes, num_slots;
    int hidden;
    DType dtype;

    // first: computes the shared expert too. last: sums up -> out [rows, hidden], with the residual if add_residual.
    void run(DecodeBuffers& buffers, int64_t rows, const Arrived& arrived, bool first, bool last, void* out,
             bool add_residual, int threads) const;

  private:
    void compute(DecodeBuffers& buffers, const Arrived& arrived, int threads) const;
    void sum_up(DecodeBuffers& buffers, void* out, bool add_residual, int threads) const;
};

}  // namespace fate
