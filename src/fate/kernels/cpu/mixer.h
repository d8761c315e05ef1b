// What mixes the positions of a sequence in a decoder layer: attention, or a recurrence. For a few rows, each the new
// token of a sequence of its own, which reads and extends what that sequence has kept; a recurrence takes several new
// tokens of each sequence, and gives each the bits that it gives one after the other. A row gets the same bits whatever
// rows share its call, and on any number of threads.
#pragma once

#include <cstdint>

#include "attention.h"
#include "layout.h"
#include "numeric.h"
#include "ops.h"
#include "scratch.h"

namespace fate {

// What a sequence has kept in a recurrent layer; updated in place.
struct StateRow {
    void* conv;    // [channels, kernel] of `dtype`: the last inputs of each channel, the newest last
    float* state;  // see the mixer
};

struct MixerStep {
    const void* x;  // [rows, hidden]
    int64_t rows;
    Rotary rotary;
    // Attention: [rows]; the row's own keys and values are written to its last position.
    const CacheRow* cache;
    CacheStrides key_strides, value_strides;
    // Recurrences: [rows / tokens], of sequences that have `tokens` new tokens each, one row after the other.
    const StateRow* states;
    int64_t tokens = 1;
    void* out;  // [rows, hidden]
    int threads;
};

class Mixer {
  public:
    Mixer(int hidden, DType dtype) : hidden_(hidden), dtype_(dtype) {}
    virtual ~Mixer() = default;

    int hidden() const { return hidden_; }
    DType dtype() const { return dtype_; }
    // Elements of a head that may be rotated; 0: the mixer takes no angles.
    virtual int rotated() const { return 0; }
    virtual bool is_recurrent() const { return false; }

    // Bytes that `run` takes of the caller's scratch, which the kernels that it calls leave alone.
    virtual int64_t scratch_bytes(int64_t rows, int threads) const = 0;
    virtual void run(const MixerStep& step, Scratch& scratch) const = 0;

  protected:
    int64_t bytes(int64_t values) const { return values * item_bytes(dtype_); }
    char* take(Scratch& scratch, int64_t values) const { return scratch.take<char>(bytes(values)); }
    int64_t taken(int64_t values) const { return Scratch::rounded(bytes(values)); }

    int hidden_;
    DType dtype_;
};

// softmax(scale * q k^T) v, every query head over the cache of its key-value head.
struct Attention : Mixer {
    Projection query, key, value;  // where they go is set by the call
    Dense output;
    int head_dim;
    float scale;
    bool gated;          // behind each head's queries the query matrix gives a gate for what the head's attention gives
    const float* sinks;  // [heads] or null: see AttentionCall

    Attention(const Projection& query, const Projection& key, const Projection& value, const Dense& output,
              int head_dim, float scale, bool gated, const float* sinks, DType dtype)
        : Mixer(query.matrix.cols, dtype), query(query), key(key), value(value), output(output), head_dim(head_dim),
          scale(scale), gated(gated), sinks(sinks) {}

    int64_t query_rows() const { return gated ? query.matrix.rows / 2 : query.matrix.rows; }
    int64_t heads() const { return query_rows() / head_dim; }
    int64_t kv_heads() const { return key.matrix.rows / head_dim; }

    int rotated() const override { return head_dim; }
    int64_t scratch_bytes(int64_t rows, int threads) const override;
    void run(const MixerStep& step, Scratch& scratch) const override;
};

// Attention whose cache holds for each position one latent vector, of which every head's keys and values are products,
// and one turned key for all heads. A query is taken to the latent space instead, and what attention gives there to the
// head's values. Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.
struct LatentAttention : Mixer {
    Dense query_down{};     // of no matrix (rows 0) where `query` takes x itself
    Norm query_norm;        // of what query_down gives
    Dense query;            // [heads * (plain_dim + turned_dim), ..]: a head's plain part, then its turned one
    Dense latent;           // [latent_dim + turned_dim, hidden]
    Norm latent_norm;       // [latent_dim]
    const void* key_up;     // [heads, plain_dim, latent_dim] of `dtype`
    Matrix up;              // [heads * (plain_dim + value_dim), latent_dim], of which the rows of values are read
    Dense output;
    int heads, plain_dim, turned_dim, value_dim, latent_dim;
    float scale;

    LatentAttention(int hidden, DType dtype) : Mixer(hidden, dtype) {}

    int rotated() const override { return turned_dim; }
    int64_t scratch_bytes(int64_t rows, int threads) const override;
    void run(const MixerStep& step, Scratch& scratch) const override;

  private:
    void absorb(const char* queries, int64_t rows, float* latents, float* scratch, int threads) const;
    void expand(const float* latents, int64_t rows, void* values, Scratch& scratch, int threads) const;
    int64_t expand_bytes(int64_t rows, int threads) const;
};

// A matrix [rows, hidden] that is packed, or, where `plain` is not null, of `dtype`.
struct Input {
    Dense packed;
    const void* plain;
    int rows;
};

// The gated delta rule over a state [value heads, key_dim, value_dim] of each sequence:
//
//   S = decay * S;  S += k (beta * (v - k^T S))^T;  out = q^T S
//
// q, k and v pass a causal convolution of each channel and SiLU; q and k are normalised. Source: Gated Delta Networks,
// arXiv 2412.06464.
struct DeltaRule : Mixer {
    Input qkv{}, z{}, b{}, a{};  // z, b and a of no rows where they are joined
    bool joined;         // qkv gives for each key head its q, k, v and z; b gives its b and a
    const void* conv;    // [channels, kernel]
    const void* conv_bias;  // [channels] or null
    int kernel;
    const float* decay;     // [value heads], negative: g = decay * softplus(a + dt_bias)
    const float* dt_bias;   // [value heads]
    Norm norm;              // [value_dim]
    Dense output;
    int key_heads, value_heads, key_dim, value_dim;

    DeltaRule(int hidden, DType dtype) : Mixer(hidden, dtype) {}

    int channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
    int values() const { return value_heads * value_dim; }
    int64_t most_plain_rows() const;
    int64_t own_floats() const { return (2 * key_dim + 3 * value_dim + kLanes - 1) / kLanes * kLanes; }

    bool is_recurrent() const override { return true; }
    int64_t scratch_bytes(int64_t rows, int threads) const override;
    void run(const MixerStep& step, Scratch& scratch) const override;

  private:
    void project(const MixerStep& step, char* mixed, char* gates, char* betas, char* alphas, Scratch& scratch) const;
    void convolve(const MixerStep& step, char* mixed) const;
    void update(const MixerStep& step, int64_t sequence, int64_t head, const char* mixed, const char* gates,
                const char* betas, const char* alphas, char* out, float* floats) const;
};

// The most bytes that any mixer's `run` and what surrounds it take of the caller's scratch. widest: the most rows or
// columns of its matrices, and of all heads in the latent space.
int64_t most_mixer_scratch_bytes(int64_t hidden, int64_t widest, int64_t rows, int threads);

}  // namespace fate
