// One body for three element types: dispatch(dtype, [&](auto type) FATE_INLINED { ... type.load(x) ... }).
//
// A body is inlined into its caller by force. What a function marked FATE_CLONES calls would otherwise run the plain
// instruction set.
#pragma once

#include <cstdint>

#include "numeric.h"

#define FATE_INLINED __attribute__((always_inline))

namespace fate {

struct OfFloat32 {
    using Element = float;
    FATE_INLINED static float load(float value) { return value; }
    FATE_INLINED static float round(float value) { return value; }
};

struct OfBFloat16 {
    using Element = uint16_t;
    FATE_INLINED static float load(uint16_t value) { return bfloat16_to_float(value); }
    FATE_INLINED static uint16_t round(float value) { return float_to_bfloat16(value); }
};

struct OfFloat16 {
    using Element = uint16_t;
    FATE_INLINED static float load(uint16_t value) { return half_to_float(value); }
    FATE_INLINED static uint16_t round(float value) { return float_to_half(value); }
};

template <typename Body>
FATE_INLINED inline void dispatch(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::kFloat32:
            return body(OfFloat32());
        case DType::kBFloat16:
            return body(OfBFloat16());
        case DType::kFloat16:
            return body(OfFloat16());
    }
}

}  // namespace fate
