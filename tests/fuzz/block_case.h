// A random sparse block of one token, in buffers of its own.
#pragma once

#include "buffers.h"
#include "decode.h"
#include "gate.h"
#include "linear.h"

namespace fuzz {

// Router, experts and shared expert of a layer.
struct Block {
    const void* x;  // [hidden]
    fate::DType dtype;
    fate::Router router;
    const fate::Record* record;  // of an expert, read whole
    fate::ExpertActivation activation;
    const uint8_t* pool;
    int64_t slot_bytes, num_slots;
    const int64_t* slots;  // of the first `known` experts; negative: not in memory
    int64_t known;
    const fate::SharedExpert* shared;  // or null
    void* out;                         // [hidden]
    int threads;
};

struct AnyBlock {
    int inner, between;
    Exact router, share, pool, slots;
    Packed gate, up, down;
    fate::Record record;
    fate::SharedExpert shared;
    Block block;

    // out: [hidden]. Unless all are to be in memory, some experts may be in no slot.
    AnyBlock(Random& random, int hidden, fate::DType dtype, int threads, const Exact& x, const Exact& out,
             bool all_in_memory = false);
    // What the functions that are joined give, called one after another; false where an expert is missing.
    bool expected(const void* x, const Exact& out) const;
};

}  // namespace fuzz
