#include "linear.h"

#include "tokens.h"

namespace fate {

namespace {

constexpr int kMaxTokens = 512;  // tokens quantized at a time, which bounds the scratch

// Memory of one pass over at most kMaxTokens tokens.
struct LinearScratch {
    TokenRows quantized;
    TokenRow* rows;
    TokenBlocks blocks;
    float* floats;  // [threads][max(cols, kTileFloats + kTileRows)]
    char* kernel;   // [threads][kernel_bytes]
    int64_t floats_each, kernel_bytes;

    LinearScratch(const Matrix& matrix, int tokens, bool blocked, int threads) {
        const int num_blocks = blocked ? blocks_of(tokens) : 0;
        floats_each = round_up(std::max<int>(matrix.cols, kTileFloats + kTileRows), kLanes);
        kernel_bytes = Scratch::rounded(tile_kernels().scratch_bytes(matrix.groups));
        Scratch& scratch = Scratch::reserve(
            rows_bytes(tokens, matrix.groups) + Scratch::rounded(tokens * sizeof(TokenRow)) +
            blocks_bytes(num_blocks, matrix.groups) + threads * (floats_each * sizeof(float) + kernel_bytes));
        quantized = take_rows(scratch, tokens, matrix.groups);
        rows = scratch.take<TokenRow>(tokens);
        blocks = take_blocks(scratch, num_blocks, matrix.groups);
        floats = scratch.take<float>(threads * floats_each);
        kernel = scratch.take<char>(threads * kernel_bytes);
    }
};

struct LinearPass {
    const Matrix& matrix;
    const char* x;
    DType dtype;
    int tokens;
    const char* bias;
    char* out;

    void quantize(const LinearScratch& scratch, int token, float* floats) const {
        load_floats(x + static_cast<int64_t>(token) * matrix.cols * item_bytes(dtype), dtype, matrix.cols, floats);
        quantize_row(floats, matrix.cols, scratch.quantized, token);
    }

    // Tile -> out, with the bias, in the caller's dtype.
    void store(int row, int count, int first, int n, float* tile, float* bias_floats) const {
        if (bias != nullptr)
            load_floats(bias + static_cast<int64_t>(row) * item_bytes(dtype), dtype, count, bias_floats);
        for (int t = 0; t < n; ++t) {
            float* values = tile + t * kTileRows;
            if (bias != nullptr) {
                for (int r = 0; r < count; ++r) values[r] += bias_floats[r];
            }
            const int64_t at = static_cast<int64_t>(first + t) * matrix.rows + row;
            store_floats(values, count, dtype, out + at * item_bytes(dtype));
        }
    }

    void run(int threads) const {
        const TileKernels& kernels = tile_kernels();
        const bool blocked = tokens >= kernels.block_min_tokens;
        const LinearScratch scratch(matrix, tokens, blocked, threads);
        const Tokens view{tokens, scratch.rows, scratch.blocks, blocked};
        const int num_blocks = blocked ? blocks_of(tokens) : 0;
        const int per_item = item_rows(matrix.rows, threads);
        const int row_items = (matrix.rows + per_item - 1) / per_item;
        const int token_items = (tokens + kTileTokens - 1) / kTileTokens;
        for (int t = 0; t < tokens; ++t) scratch.rows[t] = scratch.quantized.row(t);
        // Few tokens are quantized sooner than a helper comes.
        parallel_for(tokens, tokens > 2 ? threads : 1, [&](int64_t token, int thread) {
            quantize(scratch, static_cast<int>(token), scratch.floats + thread * scratch.floats_each);
        });
        parallel_for(num_blocks, threads, [&](int64_t block, int) {
            const int first = static_cast<int>(block) * kBlockTokens;
            interleave(scratch.rows + first, std::min(tokens - first, kBlockTokens), scratch.blocks, block);
        });
        parallel_for(row_items * token_items, threads, [&](int64_t index, int thread) {
            const int item = static_cast<int>(index);
            const int row = item / token_items * per_item, first = item % token_items * kTileTokens;
            const int count = std::min(matrix.rows - row, per_item), n = std::min(tokens - first, kTileTokens);
            float* floats = scratch.floats + thread * scratch.floats_each;
            multiply(kernels, matrix, row, count, view, first, n, floats, scratch.kernel + thread * scratch.kernel_bytes);
            store(row, count, first, n, floats, floats + kTileFloats);
        });
    }
};

}  // namespace

void linear(const Matrix& matrix, const void* x, DType dtype, int64_t tokens, const void* bias, void* out,
            int threads) {
    const int64_t item = item_bytes(dtype);
    for (int64_t first = 0; first < tokens; first += kMaxTokens) {
        const int n = static_cast<int>(std::min<int64_t>(kMaxTokens, tokens - first));
        const int64_t work = static_cast<int64_t>(matrix.rows) * matrix.cols * n;
        LinearPass{matrix,
                   static_cast<const char*>(x) + first * matrix.cols * item,
                   dtype,
                   n,
                   static_cast<const char*>(bias),
                   static_cast<char*>(out) + first * matrix.rows * item}
            .run(work < kMinParallelWork ? 1 : threads);
    }
}

}  // namespace fate
