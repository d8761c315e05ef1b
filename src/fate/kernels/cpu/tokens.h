// The tokens one matrix multiplies, in the form that suits their number, and memory for the threads that do it.
#pragma once

#include <algorithm>

#include "scratch.h"
#include "team.h"
#include "tiles.h"

namespace fate {

// Tokens of one product: in block form if there are enough of them for the block kernel.
struct Tokens {
    int count;
    const TokenRow* rows;
    TokenBlocks blocks;
    bool blocked;
};

static inline int blocks_of(int tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

// Rows row..row+count-1 times tokens first..first+n-1 (first: a multiple of kTileTokens) -> tile [n][kTileRows].
static inline void multiply(const TileKernels& kernels, const Matrix& matrix, int row, int count, const Tokens& tokens,
                            int first, int n, float* tile, void* scratch) {
    if (tokens.blocked) {
        kernels.blocks(matrix, row, count, tokens.blocks, first / kBlockTokens, blocks_of(n), tile, scratch);
    } else {
        kernels.rows(matrix, row, count, tokens.rows + first, n, tile, scratch);
    }
}

constexpr int64_t kTileFloats = static_cast<int64_t>(kTileTokens) * kTileRows;

static inline TokenRows take_rows(Scratch& scratch, int64_t count, int groups) {
    return {scratch.take<int8_t>(count * groups * kGroup), scratch.take<float>(count * padded_groups(groups)),
            scratch.take<float>(count * padded_groups(groups)), groups};
}

static inline TokenBlocks take_blocks(Scratch& scratch, int64_t blocks, int groups) {
    const int64_t lanes = blocks * kBlockTokens * groups;
    return {scratch.take<int8_t>(lanes * kGroup), scratch.take<float>(lanes), scratch.take<float>(lanes), groups};
}

// Bytes that the takes above use, rounding included.
static inline int64_t rows_bytes(int64_t count, int groups) {
    return TokenRows::bytes(count, groups) + 3 * Scratch::kAlign;
}
static inline int64_t blocks_bytes(int64_t blocks, int groups) {
    return TokenBlocks::bytes(blocks, groups) + 3 * Scratch::kAlign;
}

// Weight rows per work item: small enough to share `rows` out over the threads, whole octets, at most a tile.
static inline int item_rows(int rows, int threads) {
    return std::clamp(round_up((rows + 4 * threads - 1) / (4 * threads), 8), 8, kTileRows);
}

// Below this many weight-token products, calling helpers costs more than it saves.
constexpr int64_t kMinParallelWork = 1 << 17;

}  // namespace fate
