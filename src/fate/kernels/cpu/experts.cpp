// The experts of one layer: a list of them in one call.
//
// Experts are taken in passes of at most kMaxPairs pairs, which bounds the scratch; an expert with more pairs is cut.
// A pass has three steps, each shared over all threads:
//   first matrix, bias, activation -> inter | quantize inter | down -> rows
//
// `inter` is quantized twice, values and what rounding left of them, and `down` sums the products of both: a product of
// two factors has far larger extremes than they have, and in int8 alone it costs more accuracy than all the rest.
#include <cstring>
#include <vector>

#include "linear.h"
#include "tokens.h"

namespace fate {

namespace {

constexpr int kMaxPairs = 512;
constexpr int kFewPairs = 8;  // quantized sooner than a helper comes
constexpr int kInterRows = 2;  // of one pair

// A run of pairs of one expert within a pass; `first` counts from the start of the pass.
struct Segment {
    Matrix up, down;
    const void *up_bias, *down_bias;  // null: none
    int first, pairs;
};

struct Item {
    int segment, row, count, first, n;
};

// Work items over `rows` weight rows and at most `pairs` pairs of every segment, `rows_per_pair` tokens each.
std::vector<Item> make_items(const std::vector<Segment>& segments, int rows, int pairs, int rows_per_pair,
                             int threads) {
    std::vector<Item> items;
    for (int s = 0; s < static_cast<int>(segments.size()); ++s) {
        const int per_item = item_rows(rows * static_cast<int>(std::min<size_t>(segments.size(), 8)), threads,
                                       tile_kernels().banded(segments[s].up.mode, rows_per_pair * segments[s].pairs));
        for (int row = 0; row < rows; row += per_item) {
            for (int first = 0; first < segments[s].pairs; first += pairs) {
                items.push_back(
                    {s, row, std::min(per_item, rows - row), first, std::min(pairs, segments[s].pairs - first)});
            }
        }
    }
    return items;
}

// Adds bias[row .. row + count) to every token's `count` values in the tile.
void add_bias(const void* bias, DType dtype, int row, int count, int tokens, float* tile) {
    if (bias == nullptr) return;
    float values[kTileRows];
    load_floats(static_cast<const char*>(bias) + static_cast<int64_t>(row) * item_bytes(dtype), dtype, count, values);
    for (int t = 0; t < tokens; ++t) {
        for (int r = 0; r < count; ++r) tile[t * kTileRows + r] += values[r];
    }
}

// Two runs of `count` rows that alternate between gate and up -> gate and up.
void part(const float* first, const float* second, int count, float* gate, float* up) {
    for (int r = 0; r < 2 * count; ++r) (r % 2 == 0 ? gate : up)[r / 2] = r < count ? first[r] : second[r - count];
}

int groups_of(int cols) { return (cols + kGroup - 1) / kGroup; }

// Of one thread: two tiles, or a token as floats, and what a kernel unpacks.
int64_t thread_bytes(int hidden, int inner) {
    return Scratch::rounded((2 * kTileFloats + round_up(hidden, kLanes)) * sizeof(float) +
                            std::max(tile_kernels().scratch_bytes(groups_of(hidden)),
                                     tile_kernels().scratch_bytes(groups_of(inner))));
}

// Consecutive segments of one pass, and the pair they start at.
struct PassPlan {
    std::vector<Segment> segments;
    int64_t first_pair = 0;
    int pairs = 0;
};

class Pass {
  public:
    Pass(const ExpertsCall& call, const TokenRows& x, const PassPlan& plan, char* threads_memory,
         int64_t bytes_per_thread, Scratch& scratch)
        : call_(call),
          plan_(plan),
          pairs_(call.pairs + 2 * plan.first_pair),
          threads_memory_(threads_memory),
          bytes_per_thread_(bytes_per_thread),
          hidden_(plan.segments[0].down.rows),
          inner_(plan.segments[0].down.cols) {
        x_rows_ = scratch.take<TokenRow>(plan.pairs);
        inter_rows_ = scratch.take<TokenRow>(kInterRows * plan.pairs);
        inter_quantized_ = take_rows(scratch, kInterRows * plan.pairs, plan.segments[0].down.groups);
        inter_ = scratch.take<float>(static_cast<int64_t>(plan.pairs) * inner_);
        for (int p = 0; p < plan.pairs; ++p) x_rows_[p] = x.row(pairs_[2 * p]);
        for (int r = 0; r < kInterRows * plan.pairs; ++r) inter_rows_[r] = inter_quantized_.row(r);
    }

    static int64_t scratch_bytes(int64_t pairs, int inner) {
        return Scratch::bytes_of<TokenRow>(pairs) + Scratch::bytes_of<TokenRow>(kInterRows * pairs) +
               rows_bytes(kInterRows * pairs, groups_of(inner)) + Scratch::bytes_of<float>(pairs * inner);
    }

    void run(const std::vector<Item>& up_items, const std::vector<Item>& down_items, int threads) const {
        const auto tile = [this](int thread) {
            return reinterpret_cast<float*>(threads_memory_ + thread * bytes_per_thread_);
        };
        parallel_for(up_items.size(), threads, [&](int64_t i, int thread) { up(up_items[i], tile(thread)); });
        parallel_for(plan_.pairs, plan_.pairs > kFewPairs ? threads : 1, [&](int64_t p, int) {
            quantize_row_twice(inter_ + p * inner_, inner_, inter_quantized_, p);
        });
        parallel_for(down_items.size(), threads, [&](int64_t i, int thread) { down(down_items[i], tile(thread)); });
    }

  private:
    // Rows of the first matrix times the item's tokens, with their bias -> tile.
    void first_rows(const Segment& segment, const Item& item, int row, float* tile, void* scratch) const {
        const TokenRow* tokens = x_rows_ + segment.first + item.first;
        tile_kernels().multiply(segment.up, row, item.count, tokens, item.n, tile, scratch);
        add_bias(segment.up_bias, call_.bias_dtype, row, item.count, item.n, tile);
    }

    void up(const Item& item, float* tile) const {
        const Segment& segment = plan_.segments[item.segment];
        const ExpertActivation& activation = call_.activation;
        const bool interleaved = activation.gated && activation.interleaved;
        float* second = activation.gated ? tile + kTileFloats : nullptr;
        void* scratch = tile + 2 * kTileFloats;
        first_rows(segment, item, interleaved ? 2 * item.row : item.row, tile, scratch);
        if (interleaved) first_rows(segment, item, 2 * item.row + item.count, second, scratch);
        else if (second != nullptr) first_rows(segment, item, inner_ + item.row, second, scratch);
        for (int t = 0; t < item.n; ++t) {
            const float* gate = tile + t * kTileRows;
            const float* ups = second == nullptr ? nullptr : second + t * kTileRows;
            float parted[2 * kTileRows];
            if (interleaved) {
                part(gate, ups, item.count, parted, parted + kTileRows);
                gate = parted;
                ups = parted + kTileRows;
            }
            const int64_t pair = segment.first + item.first + t;
            activate(activation, gate, ups, item.count, inter_ + pair * inner_ + item.row);
        }
    }

    void down(const Item& item, float* tile) const {
        const Segment& segment = plan_.segments[item.segment];
        const TokenRow* tokens = inter_rows_ + kInterRows * (segment.first + item.first);
        tile_kernels().multiply(segment.down, item.row, item.count, tokens, kInterRows * item.n, tile,
                                tile + 2 * kTileFloats);
        for (int t = 0; t < item.n; ++t) {
            const int32_t* pair = pairs_ + 2 * (segment.first + item.first + t);
            float* row = call_.rows + (pair[0] * call_.top_k + pair[1]) * hidden_;
            float* values = tile + kInterRows * t * kTileRows;
            const float* rest = values + kTileRows;
            for (int r = 0; r < item.count; ++r) values[r] += rest[r];
            add_bias(segment.down_bias, call_.bias_dtype, item.row, item.count, 1, values);
            std::memcpy(row + item.row, values, item.count * sizeof(float));
        }
    }

    const ExpertsCall& call_;
    const PassPlan& plan_;
    const int32_t* pairs_;
    char* threads_memory_;
    int64_t bytes_per_thread_;
    int hidden_, inner_;
    TokenRow *x_rows_, *inter_rows_;
    TokenRows inter_quantized_;
    float* inter_;
};

// Row `number` of biases [experts, rows].
const void* bias_of(const void* biases, DType dtype, int64_t rows, int64_t number) {
    return biases == nullptr ? nullptr : static_cast<const char*>(biases) + number * rows * item_bytes(dtype);
}

// Cuts experts at kMaxPairs pairs and packs the pieces, in order, into passes.
std::vector<PassPlan> make_passes(const ExpertsCall& call, const ExpertWork* experts, int count) {
    std::vector<PassPlan> passes;
    for (int e = 0; e < count; ++e) {
        const ExpertWork& expert = experts[e];
        const Matrix up = call.record->matrix(expert.record, 0, expert.prefix_only);
        const Matrix down = call.record->matrix(expert.record, 1, expert.prefix_only);
        for (int64_t at = 0; at < expert.pairs; at += kMaxPairs) {
            const int pairs = static_cast<int>(std::min<int64_t>(kMaxPairs, expert.pairs - at));
            if (passes.empty() || passes.back().pairs + pairs > kMaxPairs) {
                passes.push_back({});
                passes.back().first_pair = expert.first_pair + at;
            }
            PassPlan& pass = passes.back();
            pass.segments.push_back({up, down, bias_of(call.up_bias, call.bias_dtype, up.rows, expert.number),
                                     bias_of(call.down_bias, call.bias_dtype, down.rows, expert.number), pass.pairs,
                                     pairs});
            pass.pairs += pairs;
        }
    }
    return passes;
}

void quantize_token(const ExpertsCall& call, int cols, int64_t token, float* floats, const TokenRows& out) {
    const char* x = static_cast<const char*>(call.x) + token * cols * item_bytes(call.dtype);
    load_floats(x, call.dtype, cols, floats);
    quantize_row(floats, cols, out, token);
}

// Of a call whose largest pass has `pairs` pairs.
int64_t call_bytes(int64_t tokens, int64_t pairs, int hidden, int inner, int threads) {
    return rows_bytes(tokens, groups_of(hidden)) + threads * thread_bytes(hidden, inner) +
           Pass::scratch_bytes(pairs, inner);
}

}  // namespace

int64_t experts_scratch_bytes(const Record& record, int64_t tokens, int threads) {
    return call_bytes(tokens, kMaxPairs, record.places[1].rows, record.places[1].cols, threads);
}

void experts(const ExpertsCall& call, const ExpertWork* work, int count) {
    const std::vector<PassPlan> passes = make_passes(call, work, count);
    if (passes.empty()) return;
    const Matrix up = passes[0].segments[0].up, down = passes[0].segments[0].down;
    const int64_t per_thread = thread_bytes(up.cols, down.cols);
    int64_t most = 0, pairs = 0;
    for (const PassPlan& pass : passes) {
        pairs += pass.pairs;
        most = std::max<int64_t>(most, pass.pairs);
    }
    const int64_t products = pairs * down.rows * down.cols;
    const int threads = products < kMinParallelWork ? 1 : call.threads;
    Scratch& scratch = Scratch::reserve(call_bytes(call.tokens, most, up.cols, down.cols, threads));
    const TokenRows x = take_rows(scratch, call.tokens, up.groups);
    char* threads_memory = scratch.take<char>(threads * per_thread);
    parallel_for(call.tokens, call.tokens > 2 ? threads : 1, [&](int64_t token, int thread) {
        quantize_token(call, up.cols, token, reinterpret_cast<float*>(threads_memory + thread * per_thread), x);
    });
    const int64_t mark = scratch.used();
    for (const PassPlan& plan : passes) {
        scratch.rewind(mark);
        const Pass pass(call, x, plan, threads_memory, per_thread, scratch);
        pass.run(make_items(plan.segments, down.cols, kTileTokens, 1, threads),
                 make_items(plan.segments, down.rows, kTileTokens / kInterRows, kInterRows, threads), threads);
    }
}

}  // namespace fate
