#include "block_case.h"

#include "activations.h"
#include "cases.h"
#include "ops.h"
#include "gate.h"
#include "linear.h"
#include "rows.h"

namespace fuzz {

using fate::DType;
using fate::Mode;

namespace {

constexpr int64_t kConstants = 64;

// Two matrices one after the other, their sections too; 64 bytes are a multiple of every section's alignment.
fate::Record record_of(bool int8, int hidden, int inner) {
    fate::Record record{int8, kConstants, 2, {}};
    const int shapes[2][2] = {{2 * inner, hidden}, {hidden, inner}};
    for (int m = 0; m < 2; ++m) {
        const Sections bytes = sections_of(shapes[m][0], shapes[m][1], int8);
        const int64_t high = record.bytes, affine = high + bytes.high, low = affine + bytes.affine;
        record.places[m] = {high, affine, low, shapes[m][0], shapes[m][1]};
        record.bytes = (low + bytes.low + 63) / 64 * 64;
    }
    return record;
}

}  // namespace

AnyBlock::AnyBlock(Random& random, int hidden, DType dtype, int threads, const Exact& x, const Exact& out,
                   bool all_in_memory)
    : inner(random.size(150)), between(random.size(150)), router(0), share(random_values(random, hidden, dtype)),
      pool(0), slots(0), gate(random, between, hidden, random.one_of({Mode::kInt4, Mode::kInt8}), ""),
      up(random, between, hidden, random.one_of({Mode::kInt4, Mode::kInt8}), ""),
      down(random, hidden, between, random.one_of({Mode::kInt4, Mode::kInt8}), ""),
      record(record_of(random.chance(0.3), hidden, inner)),
      shared{{gate.matrix}, {up.matrix}, {down.matrix}, share.as()} {
    const int experts = static_cast<int>(random.in(1, 9)), top_k = static_cast<int>(random.in(1, experts));
    const float spread = random.chance(0.3) ? 40.0f : 1.0f;  // large ones leave experts a weight of zero
    router = random_values(random, static_cast<int64_t>(experts) * hidden, dtype,
                           spread / std::sqrt(static_cast<float>(hidden)));
    const int64_t known = all_in_memory || random.chance(0.8) ? experts : random.in(0, experts);
    slots = Exact(known * 8);
    std::vector<int64_t> order(experts);
    for (int e = 0; e < experts; ++e) order[e] = e;
    std::shuffle(order.begin(), order.end(), random.engine);
    for (int64_t e = 0; e < known; ++e) slots.as<int64_t>()[e] = !all_in_memory && random.chance(0.05) ? -1 : order[e];
    pool = Exact(experts * record.bytes);
    std::memset(pool.as(), 0, pool.size());
    for (int e = 0; e < experts; ++e) {
        uint8_t* at = pool.as() + e * record.bytes;
        for (int m = 0; m < 2; ++m) {
            const fate::MatrixPlace& place = record.places[m];
            fill(random, at + place.high, at + place.affine, at + place.low, place.rows, place.cols, record.int8);
            reinterpret_cast<float*>(at)[2 * m] = 1.0f / std::sqrt(static_cast<float>(place.cols));
        }
    }
    block = {x.as(), dtype,
             {router.as(), experts, hidden, top_k, random.chance(0.5), random.chance(0.5) ? dtype : DType::kFloat32},
             &record, {}, pool.as(), record.bytes, experts,
             slots.as<int64_t>(), known, random.chance(0.7) ? &shared : nullptr, out.as(), threads};
}

bool AnyBlock::expected(const void* x, const Exact& out) const {
    const Block& b = block;
    const int64_t item = fate::item_bytes(b.dtype);
    const int top_k = b.router.top_k, hidden = b.router.hidden;
    const Exact logits(b.router.experts * item), scores(top_k * fate::item_bytes(b.router.score_dtype));
    const Exact indices(top_k * 8), rows(static_cast<int64_t>(top_k) * hidden * 4);
    fate::route(b.router, x, b.dtype, 1, {logits.as(), scores.as(), indices.as<int64_t>()}, 1);
    std::vector<int32_t> pairs;
    std::vector<fate::ExpertWork> work;
    for (int rank = 0; rank < top_k; ++rank) {
        const int64_t expert = indices.as<int64_t>()[rank];
        if (get(scores.as(), rank, b.router.score_dtype) == 0.0f) continue;
        if (expert >= b.known || b.slots[expert] < 0) return false;
        work.push_back({b.pool + b.slots[expert] * b.slot_bytes, false, static_cast<int64_t>(work.size()), 1});
        pairs.insert(pairs.end(), {0, rank});
    }
    fate::experts({b.record, x, b.dtype, 1, pairs.data(), rows.as<float>(), top_k, b.threads, b.activation},
                  work.data(), static_cast<int>(work.size()));
    fate::reduce_rows(rows.as<float>(), scores.as(), b.router.score_dtype, 1, top_k, hidden, b.dtype, out.as(),
                      b.threads);
    if (b.shared == nullptr) return true;
    const Exact given(hidden * item);
    fate::gated_mlp(b.shared->gate, b.shared->up, b.shared->down, x, b.dtype, 1, given.as(), b.threads);
    fate::add_gated(out.as(), given.as(), x, b.shared->share, b.dtype, 1, hidden, out.as(), b.threads);
    return true;
}

}  // namespace fuzz
