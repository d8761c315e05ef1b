// Memory for the tokens that a matrix multiplies, and for the threads that do it.
#pragma once

#include <algorithm>

#include "scratch.h"
#include "team.h"
#include "tiles.h"

namespace fate {

constexpr int64_t kTileFloats = static_cast<int64_t>(kTileTokens) * kTileRows;

static inline TokenRows take_rows(Scratch& scratch, int64_t count, int groups) {
    return {scratch.take<int8_t>(count * codes_pitch(groups)), scratch.take<int8_t>(count * codes_pitch(groups)),
            scratch.take<float>(count * padded_groups(groups)), scratch.take<float>(count * padded_groups(groups)),
            groups};
}

// Bytes that take_rows uses, rounding included.
static inline int64_t rows_bytes(int64_t count, int groups) {
    return TokenRows::bytes(count, groups) + 4 * Scratch::kAlign;
}

// Weight rows per work item: small enough to share `rows` out over the threads, whole octets or bands, at most a tile.
static inline int item_rows(int rows, int threads, bool banded) {
    const int unit = banded ? std::max(tile_kernels().band_rows, 8) : 8;
    return std::clamp(round_up((rows + 4 * threads - 1) / (4 * threads), unit), unit, kTileRows);
}

// Below this many weight-token products, calling helpers costs more than it saves.
constexpr int64_t kMinParallelWork = 1 << 17;

}  // namespace fate
