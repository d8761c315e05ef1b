// Row-wise helpers: the rank-ordered sum of expert outputs, and rows of a packed matrix as numbers.
#pragma once

#include <cstdint>

#include "layout.h"
#include "numeric.h"

namespace fate {

// out[t] = sum over ranks r, in order, of weights[t, r] * rows[t, r], in float32; ranks of weight zero are not read.
void reduce_rows(const float* rows, const void* weights, DType weights_dtype, int64_t tokens, int64_t top_k,
                 int64_t hidden, DType out_dtype, void* out, int threads);

// out[i] = row ids[i] of the matrix, dequantized. Ids must be within the matrix.
void gather_rows(const Matrix& matrix, const int64_t* ids, int64_t count, DType dtype, void* out, int threads);

}  // namespace fate
