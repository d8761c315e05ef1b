// The three types of activations, for code that is written once for all of them.
#pragma once

#include <type_traits>

#include "numeric.h"

namespace fate {

struct Float32 {
    using Item = float;
    static inline float to_float(float value) { return value; }
    static inline float from_float(float value) { return value; }
};

struct BFloat16 {
    using Item = uint16_t;
    static inline float to_float(uint16_t value) { return bfloat16_to_float(value); }
    static inline uint16_t from_float(float value) { return float_to_bfloat16(value); }
};

struct Float16 {
    using Item = uint16_t;
    static inline float to_float(uint16_t value) { return half_to_float(value); }
    static inline uint16_t from_float(float value) { return float_to_half(value); }
};

// body(Type()) for the type that dtype names. Inlined by force: what is called from a clone must be compiled in it.
template <typename F>
__attribute__((always_inline)) inline auto dispatch(DType dtype, const F& body) {
    if (dtype == DType::kFloat32) return body(Float32());
    if (dtype == DType::kBFloat16) return body(BFloat16());
    return body(Float16());
}

}  // namespace fate
