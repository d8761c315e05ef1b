// A packed row's codes, scales and offsets as vectors, the same for every instruction set.
#pragma once

#include "simd.h"

namespace fate {
namespace {

template <Mode mode, int vectors>
inline void unpack_short(const uint8_t* high, const uint8_t* low, Codes codes[vectors]) {
    const Codes two_bits = fill(3);
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
        codes[v] = shift_left<2>(both(short_bits<vectors>(high, v), two_bits));
        if constexpr (mode == Mode::kInt4) codes[v] = either(codes[v], both(short_bits<vectors>(low, v), two_bits));
    }
}

// A run as 4, 2 or 1 vectors of codes; in kInt2 the codes are 4h. The count is a template argument throughout: vectors
// in an array of variable length would travel through memory.
template <Mode mode, int vectors>
inline void unpack(const uint8_t* high, const uint8_t* low, Codes codes[vectors]) {
    if constexpr (mode == Mode::kInt8) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) codes[v] = load_codes(high + v * kGroup);
    } else if constexpr (vectors < 4) {
        unpack_short<mode, vectors>(high, low, codes);
    } else if constexpr (mode == Mode::kInt2) {
        const Codes h = load_codes(high), mask = fill(0x0c);
        codes[0] = both(shift_left<2>(h), mask);
        codes[1] = both(h, mask);
        codes[2] = both(shift_right<2>(h), mask);
        codes[3] = both(shift_right<4>(h), mask);
    } else {
        // Bits 2-3 and 6-7 of a byte from the high plane, the others from the low: vectors 0 and 2, then 1 and 3.
        const Codes h = load_codes(high), l = load_codes(low), high_half = fill(0xcc), nibble = fill(0x0f);
        const Codes even = select(high_half, shift_left<2>(h), l);
        const Codes odd = select(high_half, h, shift_right<2>(l));
        codes[0] = both(even, nibble);
        codes[1] = both(odd, nibble);
        codes[2] = both(shift_right<4>(even), nibble);
        codes[3] = both(shift_right<4>(odd), nibble);
    }
}

struct Affine {
    Floats scales, offsets;
};

// The scales and offsets of 16 groups from group `first`, or, unless `whole`, of the row's last; lanes beyond are zero.
template <Mode mode, bool whole>
inline Affine load_affine(const uint16_t* row, int groups, int first) {
    const uint16_t *scales_at = row + first, *offsets_at = scales_at + groups;
    const int count = groups - first;
    const Floats scales = whole ? load_halves(scales_at) : load_halves(scales_at, count);
    const Floats offsets = whole ? load_halves(offsets_at) : load_halves(offsets_at, count);
    if constexpr (mode == Mode::kInt2) return {scales, multiply_add(broadcast(1.5f), scales, offsets)};
    return {scales, offsets};
}

}  // namespace
}  // namespace fate
