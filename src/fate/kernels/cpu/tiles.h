// Tile kernels: up to kTileRows weight rows times some tokens, into a float32 tile [tokens][kTileRows].
//
// One output is always computed by the same sequence of float operations, whatever the tile, so results do not depend
// on which tokens share a call, on threads, on which of the two kernels is used or on the instruction set:
//
//   lane[j] = 0; for g = j, j + 16, ...:  lane[j] = fma(dot_g, a_g * scale_g, lane[j])     (dot_g: exact int32)
//                                         lane[j] = fma(b_g, sum_g, lane[j])
//   fold 16 lanes to 8 (j, j + 8), to 4, to 2, to 1; multiply by the matrix's gain
//
// In kInt2 the dot product runs over 4h and b_g is fma(1.5, a_g, b_g).
#pragma once

#include <vector>

#include "activations.h"
#include "layout.h"

namespace fate {

struct TileKernels {
    const char* name;
    // Tokens from which bands pay, by mode, or a number no call reaches where there is no band kernel.
    int band_min_tokens[3];
    // Weight rows of a band: fewer take as long.
    int band_rows;
    // Bytes of scratch a kernel needs per thread for a matrix of `groups` groups.
    int64_t (*scratch_bytes)(int groups);
    // Rows row..row+count-1 times n tokens -> tile[token][row], row by row.
    void (*rows)(const Matrix& matrix, int row, int count, const TokenRow* tokens, int n, float* tile, void* scratch);
    // The same in bands of rows; null: none. Writes to a tile's rows beyond `count` too.
    void (*bands)(const Matrix& matrix, int row, int count, const TokenRow* tokens, int n, float* tile, void* scratch);

    // x [n, cols] times `count` rows of `dtype`, `step` elements apart -> out[vector * pitch + row]. See float_rows.h.
    void (*dot_rows)(const float* x, int n, const void* rows, DType dtype, int64_t step, int64_t count, int cols,
                     float* out, int64_t pitch);
    // Adds weights[vector * pitch + row] times the row, of all `count` rows in order, to out [n, cols].
    void (*add_rows)(const float* weights, int64_t pitch, int n, const void* rows, DType dtype, int64_t step,
                     int64_t count, int cols, float* out);

    bool banded(Mode mode, int n) const { return n >= band_min_tokens[static_cast<int>(mode)]; }
    void multiply(const Matrix& matrix, int row, int count, const TokenRow* tokens, int n, float* tile,
                  void* scratch) const {
        (banded(matrix.mode, n) ? bands : rows)(matrix, row, count, tokens, n, tile, scratch);
    }
};

// The kernels in use: the fastest that this processor runs, until others are selected.
const TileKernels& tile_kernels();

// What this processor runs, fastest first; "portable" is always among them.
std::vector<const TileKernels*> available_tile_kernels();

// Makes every later call use the kernels called `name`; false, and nothing changes, if they are not available.
bool select_tile_kernels(const char* name);

extern const TileKernels kPortableTiles;
#if defined(FATE_X86)
extern const TileKernels kAvx512VnniTiles, kAvxVnniTiles, kAvx2Tiles;
#elif defined(FATE_ARM)
extern const TileKernels kNeonDotprodTiles, kNeonTiles;
#endif

}  // namespace fate
