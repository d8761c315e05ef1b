// Mixers whose sequences keep a latent cache or a state: some rows together against each row alone, and several tokens
// of a recurrence against one after the other: the same bits.
#include "block_case.h"
#include "cases.h"
#include "mixer.h"

namespace fuzz {

using fate::DType;
using fate::Mode;

namespace {

void require_same(const char* what, const Exact& got, const Exact& expected) {
    if (std::memcmp(got.as(), expected.as(), got.size()) != 0) fail(what, 1, 0, 0);
}

Exact copy_of(const Exact& x) {
    Exact copy(x.size());
    std::memcpy(copy.as(), x.as(), x.size());
    return copy;
}

Exact small_values(Random& random, int64_t count, DType dtype) {
    Exact values(count * fate::item_bytes(dtype));
    for (int64_t i = 0; i < count; ++i) put(values.as(), i, dtype, 0.3f * random.normal());
    return values;
}

void run(const fate::Mixer& mixer, const fate::MixerStep& step) {
    mixer.run(step, fate::Scratch::reserve(mixer.scratch_bytes(step.rows, step.threads), fate::Scratch::kCaller));
}

}  // namespace

void latent(Random& random, const std::string&) {
    const DType dtype = any_dtype(random);
    const int64_t item = fate::item_bytes(dtype), rows = random.in(1, 6);
    const int heads = static_cast<int>(random.in(1, 20)), plain = random.size(40), value = random.size(70);
    const int turned = 2 * static_cast<int>(random.in(1, 12)), space = random.size(150), hidden = random.size(130);
    const int before = random.size(90);
    const bool through = random.chance(0.5);
    const auto mode = [&] { return random.one_of({Mode::kInt4, Mode::kInt8}); };
    const Packed down(random, before, hidden, mode(), ""), latent(random, space + turned, hidden, mode(), "");
    const Packed query(random, heads * (plain + turned), through ? before : hidden, mode(), "");
    const Packed up(random, heads * (plain + value), space, mode(), ""), output(random, hidden, heads * value, mode(), "");
    const Exact key_up = small_values(random, static_cast<int64_t>(heads) * plain * space, dtype);
    const Exact norm = random_values(random, space, dtype), query_norm = random_values(random, before, dtype);
    const Exact x = small_values(random, rows * hidden, dtype);
    const auto kind = random.one_of({fate::Rotation::kHalves, fate::Rotation::kHalvesOnce,
                                     fate::Rotation::kPairsToHalves, fate::Rotation::kPairs});
    const DType of_angles = kind == fate::Rotation::kPairs ? DType::kFloat32 : dtype;
    const Exact cos = random_values(random, turned, of_angles), sin = random_values(random, turned, of_angles);
    fate::LatentAttention mixer(hidden, dtype);
    if (through) mixer.query_down = {down.matrix, nullptr};
    mixer.query_norm = {query_norm.as(), before, 1e-5f, true};
    mixer.query = {query.matrix, nullptr};
    mixer.latent = {latent.matrix, nullptr};
    mixer.latent_norm = {norm.as(), space, 1e-5f, true};
    mixer.key_up = key_up.as();
    mixer.up = up.matrix;
    mixer.output = {output.matrix, nullptr};
    mixer.heads = heads;
    mixer.plain_dim = plain;
    mixer.turned_dim = turned;
    mixer.value_dim = value;
    mixer.latent_dim = space;
    mixer.scale = 0.1f;
    std::vector<Exact> ours, theirs;
    std::vector<fate::CacheRow> together, alone;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t length = random.size(random.chance(0.1) ? 600 : 50);
        for (const int dim : {space, turned}) {
            ours.push_back(small_values(random, length * dim, dtype));
            theirs.push_back(copy_of(ours.back()));
        }
        together.push_back({ours[2 * row].as(), ours[2 * row + 1].as(), length});
        alone.push_back({theirs[2 * row].as(), theirs[2 * row + 1].as(), length});
    }
    const Exact out(rows * hidden * item), expected(rows * hidden * item);
    fate::MixerStep step{};
    step.x = x.as();
    step.rows = rows;
    step.rotary = {cos.as(), sin.as(), turned, 0, kind};
    step.cache = together.data();
    step.key_strides = {0, space};
    step.value_strides = {0, turned};
    step.out = out.as();
    step.threads = static_cast<int>(random.in(1, 3));
    run(mixer, step);
    for (int64_t row = 0; row < rows; ++row) {
        step.x = x.as() + row * hidden * item;
        step.rows = 1;
        step.cache = &alone[row];
        step.out = expected.as() + row * hidden * item;
        step.threads = 1;
        run(mixer, step);
    }
    require_same("latent attention", out, expected);
    for (size_t i = 0; i < ours.size(); ++i) require_same("the latent cache", ours[i], theirs[i]);
}

void delta(Random& random, const std::string&) {
    const DType dtype = any_dtype(random);
    const int64_t item = fate::item_bytes(dtype), sequences = random.in(1, 4), tokens = random.in(1, 9);
    const int key_heads = static_cast<int>(random.in(1, 4)), value_heads = key_heads * static_cast<int>(random.in(1, 3));
    const int key_dim = random.size(40), value_dim = random.size(70), hidden = random.size(130);
    const int kernel = static_cast<int>(random.in(1, 5));
    fate::DeltaRule rule(hidden, dtype);
    rule.key_heads = key_heads;
    rule.value_heads = value_heads;
    rule.key_dim = key_dim;
    rule.value_dim = value_dim;
    rule.kernel = kernel;
    rule.joined = random.chance(0.5);
    std::vector<Packed> packed;
    std::vector<Exact> plain;
    packed.reserve(5);
    plain.reserve(4);
    const auto input = [&](int count) {
        if (random.chance(0.3)) {
            plain.push_back(small_values(random, static_cast<int64_t>(count) * hidden, dtype));
            return fate::Input{{}, plain.back().as(), count};
        }
        packed.emplace_back(random, count, hidden, random.one_of({Mode::kInt4, Mode::kInt8}), "");
        return fate::Input{{packed.back().matrix, nullptr}, nullptr, count};
    };
    rule.qkv = input(rule.channels() + (rule.joined ? rule.values() : 0));
    rule.b = input(rule.joined ? 2 * value_heads : value_heads);
    if (!rule.joined) {
        rule.z = input(rule.values());
        rule.a = input(value_heads);
    }
    packed.emplace_back(random, hidden, rule.values(), Mode::kInt8, "");
    rule.output = {packed.back().matrix, nullptr};
    const Exact conv = small_values(random, static_cast<int64_t>(rule.channels()) * kernel, dtype);
    const Exact bias = small_values(random, rule.channels(), dtype), norm = random_values(random, value_dim, dtype);
    const Exact decay = small_values(random, value_heads, DType::kFloat32);
    const Exact dt_bias = small_values(random, value_heads, DType::kFloat32);
    for (int head = 0; head < value_heads; ++head) decay.as<float>()[head] = -std::fabs(decay.as<float>()[head]);
    rule.conv = conv.as();
    rule.conv_bias = random.chance(0.5) ? bias.as() : nullptr;
    rule.decay = decay.as<float>();
    rule.dt_bias = dt_bias.as<float>();
    rule.norm = {norm.as(), value_dim, 1e-5f, true};
    const Exact x = small_values(random, sequences * tokens * hidden, dtype);
    const int64_t state = static_cast<int64_t>(value_heads) * key_dim * value_dim;
    std::vector<Exact> ours, theirs;
    std::vector<fate::StateRow> together, alone;
    for (int64_t sequence = 0; sequence < sequences; ++sequence) {
        ours.push_back(small_values(random, static_cast<int64_t>(rule.channels()) * kernel, dtype));
        ours.push_back(small_values(random, state, DType::kFloat32));
        theirs.push_back(copy_of(ours[2 * sequence]));
        theirs.push_back(copy_of(ours[2 * sequence + 1]));
        together.push_back({ours[2 * sequence].as(), ours[2 * sequence + 1].as<float>()});
        alone.push_back({theirs[2 * sequence].as(), theirs[2 * sequence + 1].as<float>()});
    }
    const Exact out(sequences * tokens * hidden * item), expected(sequences * tokens * hidden * item);
    fate::MixerStep step{};
    step.x = x.as();
    step.rows = sequences * tokens;
    step.tokens = tokens;
    step.states = together.data();
    step.out = out.as();
    step.threads = static_cast<int>(random.in(1, 3));
    run(rule, step);
    for (int64_t row = 0; row < sequences * tokens; ++row) {
        step.x = x.as() + row * hidden * item;
        step.rows = step.tokens = 1;
        step.states = &alone[row / tokens];
        step.out = expected.as() + row * hidden * item;
        step.threads = 1;
        run(rule, step);
    }
    require_same("the delta rule", out, expected);
    for (size_t i = 0; i < ours.size(); ++i) require_same("a sequence's state", ours[i], theirs[i]);
}

}  // namespace fuzz
