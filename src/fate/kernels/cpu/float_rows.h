// Rows of numbers, as caches and routers hold them, times float32 vectors: written once over a vector layer (simd.h, or
// simd_plain.h), of which it needs the loads of 16 numbers, store, broadcast, zero_floats, add, multiply and fold, and
//
//   kDotRows, kDotVectors        the products that registers hold at once: rows times vectors of dot_rows, and of
//   kAddVectors, kAddFloats      add_rows vectors times 16 elements of their sums
//
// One output is always computed by the same sequence of float operations, whatever else is in the call:
//
//   dot_rows   lane[i % 16] += row[i] * x[i] for whole 16s; fold the lanes as in tiles.h; then the elements left
//   add_rows   out[i] += weight[r] * row[r][i] for r = 0, 1, ...
//
// Products are rounded before they are added: plain C++ then gives the same bits, and no slower.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "tiles.h"

namespace fate {
namespace {

constexpr int64_t kRowsInCache = 32;  // read again for other vectors
constexpr int kDotAlone = std::min(8, kDotRows * kDotVectors);  // rows times one vector
constexpr int kAddAlone = std::min(8, kAddVectors * kAddFloats);

FATE_INLINED inline Floats load16(OfFloat32, const float* at) { return load_floats16(at); }
FATE_INLINED inline Floats load16(OfBFloat16, const uint16_t* at) { return load_bfloats(at); }
FATE_INLINED inline Floats load16(OfFloat16, const uint16_t* at) { return load_halves(at); }

template <int vectors, int rows, typename Type>
FATE_INLINED inline void dot_tile(Type type, const float* x, const typename Type::Element* row, int64_t step, int cols,
                                  float* out, int64_t pitch) {
    Floats sums[vectors][rows];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) sums[v][r] = zero_floats();
    }
    int i = 0;
    for (; i + kLanes <= cols; i += kLanes) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Floats own = load16(type, row + r * step + i);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
                sums[v][r] = add(sums[v][r], multiply(own, load_floats16(x + v * static_cast<int64_t>(cols) + i)));
            }
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            float sum = fold(sums[v][r]);
            for (int at = i; at < cols; ++at) sum += Type::load(row[r * step + at]) * x[v * static_cast<int64_t>(cols) + at];
            out[v * pitch + r] = sum;
        }
    }
}

template <int vectors, int at_once, typename Type>
FATE_INLINED inline void dot_vectors(Type type, const float* x, const typename Type::Element* rows, int64_t step,
                                     int64_t count, int cols, float* out, int64_t pitch) {
    int64_t r = 0;
    for (; r + at_once <= count; r += at_once) {
        dot_tile<vectors, at_once>(type, x, rows + r * step, step, cols, out + r, pitch);
    }
    for (; r < count; ++r) dot_tile<vectors, 1>(type, x, rows + r * step, step, cols, out + r, pitch);
}

void simd_dot_rows(const float* x, int n, const void* rows, DType dtype, int64_t step, int64_t count, int cols,
                   float* out, int64_t pitch) {
    dispatch(dtype, [&](auto type) FATE_INLINED {
        const auto* row = static_cast<const typename decltype(type)::Element*>(rows);
        for (int64_t first = 0; first < count; first += kRowsInCache) {
            const int64_t some = std::min(kRowsInCache, count - first);
            int v = 0;
            for (; v + kDotVectors <= n; v += kDotVectors) {
                dot_vectors<kDotVectors, kDotRows>(type, x + v * static_cast<int64_t>(cols), row + first * step, step,
                                                   some, cols, out + v * pitch + first, pitch);
            }
            for (; v < n; ++v) {
                dot_vectors<1, kDotAlone>(type, x + v * static_cast<int64_t>(cols), row + first * step, step, some,
                                          cols, out + v * pitch + first, pitch);
            }
        }
    });
}

template <int vectors, int floats, typename Type>
FATE_INLINED inline void add_tile(Type type, const float* weights, int64_t pitch, const typename Type::Element* row,
                                  int64_t step, int64_t count, float* out, int cols) {
    Floats sums[vectors][floats];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 8
        for (int f = 0; f < floats; ++f) sums[v][f] = load_floats16(out + v * static_cast<int64_t>(cols) + f * kLanes);
    }
    for (int64_t r = 0; r < count; ++r) {
#pragma GCC unroll 8
        for (int f = 0; f < floats; ++f) {
            const Floats own = load16(type, row + r * step + f * kLanes);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
                sums[v][f] = add(sums[v][f], multiply(own, broadcast(weights[v * pitch + r])));
            }
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 8
        for (int f = 0; f < floats; ++f) store(out + v * static_cast<int64_t>(cols) + f * kLanes, sums[v][f]);
    }
}

// The sums of all `cols` elements of some vectors.
template <int vectors, int floats, typename Type>
FATE_INLINED inline void add_vectors(Type type, const float* weights, int64_t pitch, const typename Type::Element* row,
                                     int64_t step, int64_t count, float* out, int cols) {
    int i = 0;
    for (; i + floats * kLanes <= cols; i += floats * kLanes) {
        add_tile<vectors, floats>(type, weights, pitch, row + i, step, count, out + i, cols);
    }
    for (; i + kLanes <= cols; i += kLanes) {
        add_tile<vectors, 1>(type, weights, pitch, row + i, step, count, out + i, cols);
    }
    for (int64_t r = 0; r < count && i < cols; ++r) {
        for (int v = 0; v < vectors; ++v) {
            for (int at = i; at < cols; ++at) {
                out[v * static_cast<int64_t>(cols) + at] += weights[v * pitch + r] * Type::load(row[r * step + at]);
            }
        }
    }
}

void simd_add_rows(const float* weights, int64_t pitch, int n, const void* rows, DType dtype, int64_t step,
                   int64_t count, int cols, float* out) {
    dispatch(dtype, [&](auto type) FATE_INLINED {
        const auto* row = static_cast<const typename decltype(type)::Element*>(rows);
        for (int64_t first = 0; first < count; first += kRowsInCache) {
            const int64_t some = std::min(kRowsInCache, count - first);
            int v = 0;
            for (; v + kAddVectors <= n; v += kAddVectors) {
                add_vectors<kAddVectors, kAddFloats>(type, weights + v * pitch + first, pitch, row + first * step, step,
                                                     some, out + v * static_cast<int64_t>(cols), cols);
            }
            for (; v < n; ++v) {
                add_vectors<1, kAddAlone>(type, weights + v * pitch + first, pitch, row + first * step, step, some,
                                          out + v * static_cast<int64_t>(cols), cols);
            }
        }
    });
}

}  // namespace
}  // namespace fate
