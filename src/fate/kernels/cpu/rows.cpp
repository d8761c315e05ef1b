#include "rows.h"

#include <algorithm>

#include "tokens.h"

namespace fate {

namespace {

constexpr int64_t kPiece = 1024;  // columns summed at a time, on the stack
constexpr int64_t kMinParallelFloats = 1 << 15;

void dequantize_row(const Matrix& matrix, int64_t row, float* out) {
    const uint8_t* high = matrix.high_row(static_cast<int>(row));
    const uint8_t* low = matrix.mode == Mode::kInt4 ? matrix.low_row(static_cast<int>(row)) : nullptr;
    const uint16_t* affine = matrix.affine_row(static_cast<int>(row));
    for_chunks(matrix.groups, [&](int first, auto n) {
        const int run = n < 4 ? n * kPlaneGroupBytes : 64;  // bytes
        for (int g = 0; g < n; ++g) {
            const float a = half_to_float(affine[first + g]), b = half_to_float(affine[matrix.groups + first + g]);
            for (int c = 0; c < kGroup; ++c) {
                const int at = place_in_chunk(n, g, c), shift = at % (4 * run) / run * 2;
                const int byte = first * kPlaneGroupBytes + at / (4 * run) * run + at % run;
                float code;
                if (matrix.mode == Mode::kInt8) code = high[first * kGroup + at];
                else if (matrix.mode == Mode::kInt2) code = 4.0f * (high[byte] >> shift & 3) + 1.5f;
                else code = static_cast<float>((high[byte] >> shift & 3) << 2 | (low[byte] >> shift & 3));
                out[(first + g) * kGroup + c] = matrix.gain * (a * code + b);
            }
        }
    });
}

}  // namespace

FATE_CLONES
static void add_scaled(const float* row, float weight, int64_t count, float* sum) {
    for (int64_t i = 0; i < count; ++i) sum[i] += weight * row[i];
}

void reduce_rows(const float* rows, const void* weights, DType weights_dtype, int64_t tokens, int64_t top_k,
                 int64_t hidden, DType out_dtype, void* out, int threads) {
    const float* scale = static_cast<const float*>(weights);
    if (weights_dtype != DType::kFloat32) {
        float* floats = Scratch::reserve(Scratch::bytes_of<float>(tokens * top_k)).take<float>(tokens * top_k);
        load_floats(weights, weights_dtype, tokens * top_k, floats);
        scale = floats;
    }
    const int64_t pieces = (hidden + kPiece - 1) / kPiece;
    const int team = tokens * top_k * hidden < kMinParallelFloats ? 1 : threads;
    parallel_for(tokens * pieces, team, [&](int64_t item, int) {
        const int64_t token = item / pieces, at = item % pieces * kPiece, count = std::min(kPiece, hidden - at);
        float sum[kPiece] = {};
        for (int64_t rank = 0; rank < top_k; ++rank) {
            const float weight = scale[token * top_k + rank];
            if (weight != 0.0f) add_scaled(rows + (token * top_k + rank) * hidden + at, weight, count, sum);
        }
        store_floats(sum, count, out_dtype, static_cast<char*>(out) + (token * hidden + at) * item_bytes(out_dtype));
    });
}

void gather_rows(const Matrix& matrix, const int64_t* ids, int64_t count, DType dtype, void* out, int threads) {
    const int64_t padded = static_cast<int64_t>(matrix.groups) * kGroup;
    const int team = count * padded < kMinParallelFloats ? 1 : threads;
    float* floats = Scratch::reserve(Scratch::bytes_of<float>(team * padded)).take<float>(team * padded);
    parallel_for(count, team, [&](int64_t i, int thread) {
        float* row = floats + thread * padded;
        dequantize_row(matrix, ids[i], row);
        store_floats(row, matrix.cols, dtype, static_cast<char*>(out) + i * matrix.cols * item_bytes(dtype));
    });
}

}  // namespace fate
