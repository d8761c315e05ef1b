// What joins several kernels in one call, against those kernels called one after another: the same bits.
#include "block_case.h"
#include "cases.h"
#include "ops.h"
#include "gate.h"
#include "linear.h"

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

// The caches of some sequences, each in memory of its own that ends with its last position, all of the same strides.
struct Caches {
    std::vector<Exact> values;
    fate::CacheStrides strides;

    Caches(Random& random, const std::vector<int64_t>& lengths, int64_t kv_heads, int dim, DType dtype) {
        const int64_t room = *std::max_element(lengths.begin(), lengths.end()) + random.in(0, 3);
        strides = random.chance(0.5) ? fate::CacheStrides{room * dim, dim} : fate::CacheStrides{dim, kv_heads * dim};
        for (const int64_t length : lengths) {
            const int64_t last = (kv_heads - 1) * strides.head + (length - 1) * strides.position;
            values.push_back(random_values(random, last + dim, dtype));
        }
    }
};

fate::Norm any_norm(Random& random, const Exact& weight, int cols) {
    return {weight.as(), cols, 1e-5f, random.chance(0.5)};
}

}  // namespace

void layer(Random& random, const std::string&) {
    const DType dtype = any_dtype(random);
    const int64_t item = fate::item_bytes(dtype), rows = random.chance(0.3) ? 1 : random.in(1, 16);
    const int kv_heads = static_cast<int>(random.in(1, 3)), heads = kv_heads * static_cast<int>(random.in(1, 3));
    const int dim = random.size(70), hidden = random.size(200), threads = static_cast<int>(random.in(1, 3));
    const auto mode = [&] { return random.one_of({Mode::kInt4, Mode::kInt8}); };
    const Packed query(random, heads * dim, hidden, mode(), ""), key(random, kv_heads * dim, hidden, mode(), "");
    const Packed value(random, kv_heads * dim, hidden, mode(), ""), output(random, hidden, heads * dim, mode(), "");
    const Exact query_bias = random_values(random, heads * dim, dtype), before = random_values(random, hidden, dtype);
    const Exact output_bias = random_values(random, hidden, dtype), after = random_values(random, hidden, dtype);
    const Exact head_norm = random_values(random, dim, dtype), x = random_values(random, rows * hidden, dtype);
    const int turned = static_cast<int>(random.in(0, dim / 2)) * 2, step_of = random.chance(0.5) ? turned : 0;
    const int64_t angles = step_of != 0 ? rows * turned : turned;
    const Exact cos = random_values(random, angles, dtype), sin = random_values(random, angles, dtype);
    const fate::Norm none{nullptr, 0, 0.0f, false};
    const bool biased = random.chance(0.5), normed_heads = random.chance(0.5);
    const fate::Norm of_heads = normed_heads ? any_norm(random, head_norm, dim) : none;
    const fate::Attention mixer({query.matrix, biased ? query_bias.as() : nullptr, of_heads, nullptr},
                                {key.matrix, nullptr, of_heads, nullptr}, {value.matrix, nullptr, none, nullptr},
                                {output.matrix, biased ? output_bias.as() : nullptr}, dim,
                                0.3f / std::sqrt(static_cast<float>(dim)), false, nullptr, dtype);
    const fate::MixerHalf half{any_norm(random, before, hidden), any_norm(random, after, hidden), &mixer};
    std::vector<int64_t> lengths;
    for (int64_t row = 0; row < rows; ++row) lengths.push_back(random.size(random.chance(0.1) ? 600 : 60));
    const Caches keys(random, lengths, kv_heads, dim, dtype), values(random, lengths, kv_heads, dim, dtype);
    std::vector<Exact> our_keys, our_values;
    std::vector<fate::CacheRow> ours, theirs;
    for (int64_t row = 0; row < rows; ++row) {
        our_keys.push_back(copy_of(keys.values[row]));
        our_values.push_back(copy_of(values.values[row]));
        ours.push_back({our_keys[row].as(), our_values[row].as(), lengths[row]});
        theirs.push_back({keys.values[row].as(), values.values[row].as(), lengths[row]});
    }
    const Exact residual(rows * hidden * item), normed(rows * hidden * item);
    fate::MixerStep step{};
    step.x = x.as();
    step.rows = rows;
    step.rotary = {cos.as(), sin.as(), turned, step_of};
    step.cache = ours.data();
    step.key_strides = keys.strides;
    step.value_strides = values.strides;
    step.threads = threads;
    half.run(step, residual.as(), normed.as());

    const Exact expected(rows * hidden * item), expected_normed(rows * hidden * item);
    for (int64_t row = 0; row < rows; ++row) {  // each alone, out of what is joined
        const int64_t at = row * hidden * item, place = row * step_of * item;
        const Exact first(hidden * item), q(heads * dim * item), k(kv_heads * dim * item), v(kv_heads * dim * item);
        const Exact attended(hidden * item);
        fate::rms_norm(half.input_norm, x.as() + at, dtype, 1, first.as(), 1);
        fate::HeadsCall call{mixer.query, mixer.key, mixer.value, {cos.as() + place, sin.as() + place, turned, 0},
                             first.as(), dtype, 1, dim, 1, &theirs[row], keys.strides, values.strides};
        call.query.out = q.as();
        call.key.out = k.as();
        call.value.out = v.as();
        fate::project_heads(call);
        const Exact given(heads * dim * item);
        fate::attend({q.as(), &theirs[row], keys.strides, values.strides, dtype, 1, heads, kv_heads, dim, dim,
                      mixer.scale, given.as(), 1});
        fate::linear({{mixer.output.matrix, mixer.output.bias, attended.as()}}, given.as(), dtype, 1, 1);
        fate::add_values(x.as() + at, attended.as(), dtype, hidden, expected.as() + at);
        fate::rms_norm(half.post_norm, expected.as() + at, dtype, 1, expected_normed.as() + at, 1);
        require_same("keys in the cache", our_keys[row], keys.values[row]);
        require_same("values in the cache", our_values[row], values.values[row]);
    }
    require_same("x + attention", residual, expected);
    require_same("its norm", normed, expected_normed);
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
    fate::add_gated(experts.as(), shared.as(), x.as(), gate.as(), dtype, tokens, hidden, out.as(),
                    static_cast<int>(random.in(1, 3)));
    fate::multiply_few_rows(gate.as(), x.as(), dtype, 1, hidden, tokens, logits.as(), 1);
    for (int64_t i = 0; i < tokens * hidden; ++i) {
        const float share = rounded(1.0f / (1.0f + std::exp(-get(logits.as(), i / hidden, dtype))), dtype);
        const double added = static_cast<double>(share) * get(shared.as(), i, dtype);
        const double exact = get(experts.as(), i, dtype) + added;
        near("experts + gate * shared", get(out.as(), i, dtype), exact,
             1e-6 + rounding(dtype) * (std::fabs(exact) + 2 * std::fabs(added)));
    }
}

}  // namespace fuzz
