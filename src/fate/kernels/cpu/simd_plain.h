// What float_rows.h needs of a vector layer, in plain C++.
#pragma once

#include <cstdint>
#include <cstring>

#include "layout.h"
#include "numeric.h"

namespace fate {
namespace {

struct Floats {
    float lane[kLanes];
};

template <typename F>
__attribute__((always_inline)) inline Floats lanes_of(const F& f) {
    Floats x;
    for (int j = 0; j < kLanes; ++j) x.lane[j] = f(j);
    return x;
}

inline Floats load_floats16(const float* at) {
    return lanes_of([&](int j) { return at[j]; });
}
inline Floats load_bfloats(const uint16_t* at) {
    return lanes_of([&](int j) { return bfloat16_to_float(at[j]); });
}
inline Floats load_halves(const uint16_t* at) {
    return lanes_of([&](int j) { return half_to_float(at[j]); });
}
inline void store(float* at, const Floats& x) { std::memcpy(at, x.lane, sizeof x.lane); }
inline Floats broadcast(float value) {
    return lanes_of([&](int) { return value; });
}
inline Floats zero_floats() { return broadcast(0.0f); }
inline Floats add(const Floats& x, const Floats& y) {
    return lanes_of([&](int j) { return x.lane[j] + y.lane[j]; });
}
inline Floats multiply(const Floats& x, const Floats& y) {
    return lanes_of([&](int j) { return x.lane[j] * y.lane[j]; });
}
inline float fold(Floats x) {
    for (int half = kLanes / 2; half >= 1; half /= 2) {
        for (int j = 0; j < half; ++j) x.lane[j] += x.lane[j + half];
    }
    return x.lane[0];
}

constexpr int kDotRows = 1, kDotVectors = 1, kAddVectors = 1, kAddFloats = 1;

}  // namespace
}  // namespace fate
