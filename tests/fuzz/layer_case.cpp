// What joins several kernels in one call, against those kernels called one after another: the same bits.
#include "block_case.h"
#include "cases.h"
#include "fused.h"
#include "gate.h"

namespace fuzz {

using fate::DType;
using fate::Mode;

namespace {

bool same(const Exact& x, const Exact& y) { return std::memcmp(x.as(), y.as(), x.size()) == 0; }

void require_same(const char* what, const Exact& got, const Exact& expected) {
    if (!same(got, expected)) fail(what, 1, 0, 0);
}

Exact copy_of(const Exact& x) {
    Exact copy(x.size());
    std::memcpy(copy.as(), x.as(), x.size());
    return copy;
}

float rounded(float value, DType dtype) {
    float place;
    put(&place, 0, dtype, value);
    return get(&place, 0, dtype);
}

// One sequence's new token in each of `tokens`, over a cache that ends with its last position.
struct Cache {
    Exact values;
    fate::CacheStrides strides;

    Cache(Random& random, int64_t tokens, int64_t kv_heads, int64_t length, int dim, DType dtype) : values(0) {
        const int64_t room = length + random.in(0, 3);
        strides = random.chance(0.5) ? fate::CacheStrides{kv_heads * room * dim, room * dim, dim}
                                     : fate::CacheStrides{kv_heads * room * dim, dim, kv_heads * dim};
        const int64_t last = (tokens - 1) * strides.batch + (kv_heads - 1) * strides.head;
        values = random_values(random, last + (length - 1) * strides.position + dim, dtype);
    }

    void append(const Exact& heads, int64_t tokens, int64_t kv_heads, int64_t length, int dim, DType dtype) const {
        for (int64_t token = 0; token < tokens; ++token) {
            for (int64_t head = 0; head < kv_heads; ++head) {
                const int64_t at = token * strides.batch + head * strides.head + (length - 1) * strides.position;
                for (int64_t i = 0; i < dim; ++i) {
                    put(values.as(), at + i, dtype, get(heads.as(), (token * kv_heads + head) * dim + i, dtype));
                }
            }
        }
    }
};

fate::Norm any_norm(Random& random, const Exact& weight, int cols) {
    return {weight.as(), cols, 1e-5f, random.chance(0.5)};
}

// A layer with a sparse block, whose first half is known to give these. It appends to the cache what is there already.
void with_block(Random& random, const fate::AttentionHalf& half, const Exact& residual, const Exact& normed) {
    const DType dtype = half.heads.dtype;
    const int hidden = half.before.cols;
    const Exact out(residual.size()), expected(residual.size()), of_block(residual.size());
    const AnyBlock any(random, hidden, dtype, half.heads.threads, normed, of_block);
    std::vector<int> experts;
    const bool whole = any.expected(normed.as(), expected, experts);
    const fate::BlockRun run = fate::decoder_layer(half, any.block, out.as());
    if (run.whole != whole) fail("all experts of a layer are in memory", run.whole, whole, 0);
    const Exact ours[2] = {Exact(residual.size()), Exact(residual.size())};
    std::memcpy(ours[0].as(), half.residual, residual.size());
    std::memcpy(ours[1].as(), half.normed, residual.size());
    require_same("x + attention, of a layer", ours[0], residual);
    require_same("its norm, of a layer", ours[1], normed);
    if (!whole) return;
    for (int i = 0; i < hidden; ++i) {
        put(expected.as(), i, dtype, get(residual.as(), i, dtype) + get(expected.as(), i, dtype));
    }
    require_same("a layer in one call", out, expected);
}

}  // namespace

void layer(Random& random, const std::string&) {
    const DType dtype = any_dtype(random);
    const int64_t item = fate::item_bytes(dtype), tokens = random.in(1, 3), length = random.size(60);
    const int kv_heads = static_cast<int>(random.in(1, 3)), heads = kv_heads * static_cast<int>(random.in(1, 3));
    const int dim = random.size(70), hidden = random.size(200), threads = static_cast<int>(random.in(1, 3));
    const auto mode = [&] { return random.one_of({Mode::kInt4, Mode::kInt8}); };
    const Packed query(random, heads * dim, hidden, mode(), ""), key(random, kv_heads * dim, hidden, mode(), "");
    const Packed value(random, kv_heads * dim, hidden, mode(), ""), output(random, hidden, heads * dim, mode(), "");
    const Exact query_bias = random_values(random, heads * dim, dtype), before = random_values(random, hidden, dtype);
    const Exact output_bias = random_values(random, hidden, dtype), after = random_values(random, hidden, dtype);
    const Exact head_norm = random_values(random, dim, dtype), x = random_values(random, tokens * hidden, dtype);
    const int turned = static_cast<int>(random.in(0, dim / 2)) * 2, step = random.chance(0.5) ? turned : 0;
    const int64_t angles = step != 0 ? tokens * turned : turned;
    const Exact cos = random_values(random, angles, dtype), sin = random_values(random, angles, dtype);
    const fate::Norm none{nullptr, 0, 0.0f, false};
    const bool biased = random.chance(0.5), normed_heads = random.chance(0.5);

    fate::AttentionHalf half{};
    half.before = any_norm(random, before, hidden);
    half.after = any_norm(random, after, hidden);
    const fate::Norm of_heads = normed_heads ? any_norm(random, head_norm, dim) : none;
    half.heads = {{query.matrix, biased ? query_bias.as() : nullptr, of_heads, nullptr},
                  {key.matrix, nullptr, of_heads, nullptr},
                  {value.matrix, nullptr, none, nullptr},
                  {cos.as(), sin.as(), turned, step},
                  x.as(),
                  dtype,
                  tokens,
                  dim,
                  threads};
    const Cache keys(random, tokens, kv_heads, length, dim, dtype);
    const Cache values(random, tokens, kv_heads, length, dim, dtype);
    const Exact our_keys = copy_of(keys.values), our_values = copy_of(values.values);
    const Exact residual(tokens * hidden * item), normed(tokens * hidden * item);
    half.attention = {nullptr, our_keys.as(), our_values.as(), keys.strides, values.strides, dtype, tokens, heads,
                      kv_heads, length, dim, dim, 0.3f / std::sqrt(static_cast<float>(dim)), nullptr, threads};
    half.output = output.matrix;
    half.output_bias = biased ? output_bias.as() : nullptr;
    half.keys = our_keys.as();
    half.values = our_values.as();
    half.residual = residual.as();
    half.normed = normed.as();
    fate::attention_half(half);

    const Exact first(tokens * hidden * item), q(tokens * heads * dim * item), k(tokens * kv_heads * dim * item);
    const Exact v(tokens * kv_heads * dim * item), attended(tokens * hidden * item);
    fate::rms_norm(half.before, x.as(), dtype, tokens, first.as(), threads);
    fate::HeadsCall call = half.heads;
    call.x = first.as();
    call.query.out = q.as();
    call.key.out = k.as();
    call.value.out = v.as();
    fate::project_heads(call);
    keys.append(k, tokens, kv_heads, length, dim, dtype);
    values.append(v, tokens, kv_heads, length, dim, dtype);
    require_same("keys in the cache", our_keys, keys.values);
    require_same("values in the cache", our_values, values.values);
    fate::AttentionCall attention = half.attention;
    attention.q = q.as();
    fate::attend_project(attention, half.output, half.output_bias, attended.as());
    const Exact expected(tokens * hidden * item), expected_normed(tokens * hidden * item);
    for (int64_t i = 0; i < tokens * hidden; ++i) {
        put(expected.as(), i, dtype, get(x.as(), i, dtype) + get(attended.as(), i, dtype));
    }
    fate::rms_norm(half.after, expected.as(), dtype, tokens, expected_normed.as(), threads);
    require_same("x + attention", residual, expected);
    require_same("its norm", normed, expected_normed);
    if (tokens == 1) with_block(random, half, expected, expected_normed);
}

void gated(Random& random, const std::string&) {
    const DType dtype = any_dtype(random);
    const int64_t tokens = random.in(1, 9);
    const int hidden = random.size(300);
    const Exact x = random_values(random, tokens * hidden, dtype);
    const Exact experts = random_values(random, tokens * hidden, dtype);
    const Exact shared = random_values(random, tokens * hidden, dtype);
    const Exact gate = random_values(random, hidden, dtype, 0.3f / std::sqrt(static_cast<float>(hidden)));
    const Exact out(tokens * hidden * fate::item_bytes(dtype)), logits(tokens * fate::item_bytes(dtype));
    fate::add_gated(experts.as(), shared.as(), x.as(), gate.as(), dtype, tokens, hidden, out.as());
    fate::multiply_few_rows(gate.as(), x.as(), dtype, 1, hidden, tokens, logits.as());
    for (int64_t i = 0; i < tokens * hidden; ++i) {
        const float share = rounded(1.0f / (1.0f + std::exp(-get(logits.as(), i / hidden, dtype))), dtype);
        const double added = static_cast<double>(share) * get(shared.as(), i, dtype);
        const double exact = get(experts.as(), i, dtype) + added;
        near("experts + gate * shared", get(out.as(), i, dtype), exact,
             1e-6 + rounding(dtype) * (std::fabs(exact) + 2 * std::fabs(added)));
    }
}

}  // namespace fuzz
