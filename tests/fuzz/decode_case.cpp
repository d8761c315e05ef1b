// The second half of a layer for some rows, its experts in some groups, against each row alone: the same bits.
#include "block_case.h"
#include "cases.h"
#include "decode.h"

namespace fuzz {

using fate::DType;

void decode(Random& random, const std::string&) {
    const DType dtype = any_dtype(random);
    const int hidden = random.size(300), threads = static_cast<int>(random.in(1, 3));
    const int64_t rows = random.in(1, 16), item = fate::item_bytes(dtype), bytes = hidden * item;
    const Exact x = random_values(random, rows * hidden, dtype), unused(bytes);
    const AnyBlock any(random, hidden, dtype, threads, x, unused, true);
    const fate::Router& router = any.block.router;
    const int64_t max_rows = random.in(rows, 16);
    const Exact residual = random_values(random, max_rows * hidden, dtype), normed(max_rows * bytes);
    const Exact logits(max_rows * router.experts * item), scores(max_rows * router.top_k * 4);
    const Exact indices(max_rows * router.top_k * 8), out(rows * bytes), expected(rows * bytes);
    fate::DecodeBuffers buffers(max_rows, hidden, router.top_k, router.experts, dtype,
                                {residual.as(), normed.as(), logits.as(), scores.as(), indices.as<int64_t>()});
    fate::ExpertHalf half{};
    half.record = any.record;
    half.bias_dtype = dtype;
    half.has_shared = any.block.shared != nullptr;
    half.shared = any.shared;
    half.pool = any.block.pool;
    half.slot_bytes = any.block.slot_bytes;
    half.num_slots = any.block.num_slots;
    half.hidden = hidden;
    half.dtype = dtype;
    for (int64_t row = 0; row < rows; ++row) {
        const Exact own(bytes), sum(bytes);
        if (!any.expected(x.as() + row * bytes, own)) fail("all experts are in memory", 0, 1, 0);
        fate::add_values(residual.as() + row * bytes, own.as(), dtype, hidden, expected.as() + row * bytes);
    }
    buffers.set_normed(x.as(), rows);
    const fate::Routed routed = buffers.route(router, rows, threads);
    std::vector<int64_t> own, slots;
    size_t next = 0;
    for (bool first = true, last = false; !last; first = false) {
        own.clear();
        slots.clear();
        const size_t all = routed.experts.size(), some = static_cast<size_t>(random.in(0, 3));
        const size_t end = random.chance(0.4) ? all : std::min(all, next + some);
        for (; next < end; ++next) {
            own.push_back(routed.experts[next]);
            slots.push_back(any.block.slots[routed.experts[next]]);
        }
        last = next == routed.experts.size();
        half.run(buffers, rows, {own.data(), slots.data(), nullptr, static_cast<int64_t>(own.size())}, first, last,
                 last ? out.as() : nullptr, true, threads);
    }
    if (std::memcmp(out.as(), expected.as(), out.size()) != 0) fail("experts of some rows, in groups", 1, 0, 0);
}

}  // namespace fuzz
