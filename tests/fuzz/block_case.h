// A random sparse block of one token, in buffers of its own.
#pragma once

#include "block.h"
#include "buffers.h"

namespace fuzz {

struct AnyBlock {
    int inner, between;
    Exact router, share, pool, slots;
    Packed gate, up, down;
    fate::Record record;
    fate::SharedExpert shared;
    fate::SparseBlock block;

    // out: [hidden]. Unless all are to be in memory, some experts may be in no slot.
    AnyBlock(Random& random, int hidden, fate::DType dtype, int threads, const Exact& x, const Exact& out,
             bool all_in_memory = false);
    // What the functions it joins give, called one after another; false where an expert is missing.
    bool expected(const void* x, const Exact& out, std::vector<int>& experts) const;
};

}  // namespace fuzz
