// Weights to packed matrices: fate/quant/hqq.py and fate/quant/nested.py, which give the meaning, in one pass per row.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace fate {

struct QuantizeSettings {
    int iterations;
    float p, beta, kappa;
};

// Where one matrix's sections go; `low` is null for 8-bit codes.
struct PackedSections {
    uint8_t* high;
    uint16_t* affine;
    uint8_t* low;
};

// Sums over the matrix of w * w and w * w_int2, in units of (inverse_unit)^-2; zero for 8-bit codes.
struct SlopeSums {
    double squares, products;
};

// Of weights [rows, cols], `pitch` elements from one row to the next; not finite where a weight is not.
float largest_magnitude(const void* weights, DType dtype, int64_t pitch, int rows, int cols);

// weights: [rows, cols] of `dtype`, `pitch` elements from one row to the next, times `inverse_unit` within [-1, 1].
// Scales and offsets are stored times 2^headroom.
SlopeSums quantize_matrix(const void* weights, DType dtype, int64_t pitch, int rows, int cols, float inverse_unit,
                          int headroom, const QuantizeSettings& settings, const PackedSections& out, int threads);

}  // namespace fate
