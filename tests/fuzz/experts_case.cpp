// Experts: each record in a buffer of its own, its sections in any order and poison between them.
#include <numeric>

#include "cases.h"
#include "linear.h"

namespace fuzz {

using fate::ActivationKind;
using fate::DType;
using fate::ExpertActivation;
using fate::Matrix;

namespace {

constexpr int64_t kGap = 16;
constexpr int64_t kBeforeScales = 16;  // the kernels may read 14 bytes before them (see simd.h)

// An expert's two matrices at random places; `gaps` are what no kernel may touch, `low` what a prefix does not hold.
struct Plan {
    fate::Record record{};
    std::vector<std::pair<int64_t, int64_t>> gaps, low;

    Plan(Random& random, bool int8, const int (&shapes)[2][2]) {
        record.int8 = int8;
        record.count = 2;
        struct Part {
            int64_t* at;
            int64_t bytes;
            bool low, scales;
        };
        std::vector<Part> parts;
        for (int m = 0; m < 2; ++m) {
            record.places[m] = {0, 0, 0, shapes[m][0], shapes[m][1]};
            const Sections bytes = sections_of(shapes[m][0], shapes[m][1], int8);
            parts.push_back({&record.places[m].high, bytes.high, false, false});
            parts.push_back({&record.places[m].affine, bytes.affine, false, true});
            if (!int8) parts.push_back({&record.places[m].low, bytes.low, true, false});
        }
        std::shuffle(parts.begin(), parts.end(), random.engine);
        int64_t end = 64;
        for (size_t p = 0; p < parts.size(); ++p) {
            const Part& part = parts[p];
            *part.at = end;
            if (part.low) low.push_back({end, part.bytes});
            end += part.bytes;
            if (p + 1 == parts.size()) break;
            const int64_t before = parts[p + 1].scales ? kBeforeScales : 0, next = (end + kGap + before + 7) / 8 * 8;
            gaps.push_back({end, next - before - end});
            end = next;
        }
        record.bytes = end;
    }
};

ExpertActivation any_activation(Random& random) {
    ExpertActivation form;
    form.kind = static_cast<ActivationKind>(random.in(0, 5));
    form.gated = form.kind == ActivationKind::kSiluSoftcap || random.chance(0.7);
    form.interleaved = random.chance(0.4);
    if (form.gated && random.chance(0.5)) {
        form.gate_max = static_cast<float>(random.in(1, 4));
        form.up_limit = static_cast<float>(random.in(1, 4));
        if (random.chance(0.3)) form.act_max = 0.7f;
        if (random.chance(0.5)) form.up_offset = 1.0f;
    }
    if (form.kind == ActivationKind::kSilu && random.chance(0.4)) form.alpha = 1.702f;
    return form;
}

double act(const ExpertActivation& form, double x) {
    switch (form.kind) {
        case ActivationKind::kGelu: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
        case ActivationKind::kGeluTanh:
            return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
        case ActivationKind::kRelu: return std::max(x, 0.0);
        case ActivationKind::kRelu2: return std::max(x, 0.0) * std::max(x, 0.0);
        default: return x / (1 + std::exp(-form.alpha * x));
    }
}

double softcap(double x, double limit) { return std::isinf(limit) ? x : limit * std::tanh(x / limit); }

double gated(const ExpertActivation& form, double gate, double up) {
    const double limit = form.up_limit;
    if (form.kind == ActivationKind::kSiluSoftcap) {
        return softcap(gate, form.gate_max) / (1 + std::exp(-gate)) * softcap(up, limit);
    }
    const double activated = std::min<double>(act(form, std::min<double>(gate, form.gate_max)), form.act_max);
    return activated * (std::clamp(up, -limit, limit) + form.up_offset);
}

// A number and how large what was added up to it is, which its float32 rounding grows with.
struct Sum {
    double value, size;
};

struct Call {
    fate::ExpertsCall call;
    int hidden, inner;
    Exact x, up_bias, down_bias;
    DType bias_dtype;

    Sum product(const std::vector<double>& weights, const std::vector<double>& values, int64_t row, const Exact& bias,
                int64_t bias_at) const {
        const double added = call.up_bias == nullptr ? 0.0 : get(bias.as(), bias_at, bias_dtype);
        Sum sum{added, std::fabs(added)};
        const int64_t cols = static_cast<int64_t>(values.size());
        for (int64_t i = 0; i < cols; ++i) {
            sum.value += weights[row * cols + i] * values[i];
            const double terms = std::fabs(weights[row * cols + i]) + 2 / std::sqrt(static_cast<double>(cols));
            sum.size += terms * std::fabs(values[i]);
        }
        return sum;
    }

    // rows [hidden] of one token by one expert.
    std::vector<Sum> exact(const Matrix& up, const Matrix& down, int64_t number, int64_t token) const {
        const std::vector<double> first = dequantize(up), second = dequantize(down);
        std::vector<float> values(hidden);
        for (int64_t i = 0; i < hidden; ++i) values[i] = get(x.as(), token * hidden + i, call.dtype);
        const std::vector<double> rounded = rounded_to_int8(values);
        const ExpertActivation& form = call.activation;
        std::vector<double> between(inner), wrong(inner);
        for (int64_t i = 0; i < inner; ++i) {
            const int64_t gate_row = form.gated && form.interleaved ? 2 * i : i;
            const int64_t up_row = form.interleaved ? 2 * i + 1 : inner + i;
            const Sum gate = product(first, rounded, gate_row, up_bias, number * up.rows + gate_row);
            Sum ups{1, 1};
            if (form.gated) ups = product(first, rounded, up_row, up_bias, number * up.rows + up_row);
            between[i] = form.gated ? gated(form, gate.value, ups.value) : act(form, gate.value);
            const double slope = form.kind == ActivationKind::kRelu2 ? gate.size + 1 : 1;
            wrong[i] = 2e-5 * (gate.size + 0.01) * slope * (ups.size + form.up_offset + 0.01);
        }
        for (int64_t group = 0; group < inner; group += fate::kGroup) {  // 15 bits of a group's largest
            const int64_t end = std::min<int64_t>(inner, group + fate::kGroup);
            double most = 0;
            for (int64_t i = group; i < end; ++i) most = std::max(most, std::fabs(between[i]) + wrong[i]);
            for (int64_t i = group; i < end; ++i) wrong[i] += 2e-5 * most;
        }
        std::vector<Sum> rows(hidden);
        for (int64_t row = 0; row < hidden; ++row) {
            const Sum sum = product(second, between, row, down_bias, number * hidden + row);
            double bound = 2e-5 * sum.size + 1e-6;
            for (int64_t i = 0; i < inner; ++i) bound += wrong[i] * std::fabs(second[row * inner + i]);
            rows[row] = {sum.value, bound};
        }
        return rows;
    }
};

}  // namespace

void experts(Random& random, const std::string& planted) {
    const bool wide = random.chance(0.2), deep = random.chance(0.2);  // chunks of 16 groups
    const int hidden = random.size(wide ? 1500 : 330), inner = random.size(deep ? 1500 : wide ? 70 : 270);
    const int tokens = random.chance(0.7) ? static_cast<int>(random.in(1, 12)) : static_cast<int>(random.in(1, 700));
    const int count = static_cast<int>(random.in(1, 5)), top_k = static_cast<int>(random.in(1, 3));
    const int biases = count + static_cast<int>(random.in(0, 2));
    const ExpertActivation form = any_activation(random);
    const bool int8 = random.chance(0.3), biased = random.chance(0.5);
    const int shapes[2][2] = {{form.gated ? 2 * inner : inner, hidden}, {hidden, inner}};
    const Plan plan(random, int8, shapes);
    const DType dtype = any_dtype(random), bias_dtype = any_dtype(random);

    std::vector<Exact> records;
    std::vector<fate::ExpertWork> work(count);
    for (int e = 0; e < count; ++e) {
        const Exact full(plan.record.bytes);
        std::memset(full.as(), 0, full.size());
        for (int m = 0; m < 2; ++m) {
            const fate::MatrixPlace& place = plan.record.places[m];
            fill(random, full.as() + place.high, full.as() + place.affine, full.as() + place.low, place.rows,
                 place.cols, int8);
            full.as<float>()[2 * m] = 1.0f / std::sqrt(static_cast<float>(place.cols));
            full.as<float>()[2 * m + 1] = 1.03f;
        }
        records.emplace_back(full.size() - (planted == "experts-record" ? 1 : 0));
        std::memcpy(records.back().as(), full.as(), records.back().size());
        work[e].prefix_only = !int8 && random.chance(0.4);
        work[e].record = records.back().as();
        work[e].number = random.in(0, biases - 1);
    }
    // Every (token, rank) has an expert or none.
    std::vector<std::vector<std::pair<int, int>>> of(count);
    for (int t = 0; t < tokens; ++t) {
        for (int r = 0; r < top_k; ++r) {
            if (random.chance(0.9)) of[random.chance(0.5) ? 0 : random.in(0, count - 1)].push_back({t, r});
        }
    }
    int64_t total = 0;
    for (int e = 0; e < count; ++e) {
        work[e].first_pair = total;
        work[e].pairs = static_cast<int64_t>(of[e].size());
        total += work[e].pairs;
    }
    const Exact pairs(total * 8), rows(static_cast<int64_t>(tokens) * top_k * hidden * 4);
    for (int64_t i = 0; i < rows.size() / 4; ++i) rows.as<float>()[i] = NAN;
    for (int e = 0; e < count; ++e) {
        for (size_t p = 0; p < of[e].size(); ++p) {
            pairs.as<int32_t>()[2 * (work[e].first_pair + p)] = of[e][p].first;
            pairs.as<int32_t>()[2 * (work[e].first_pair + p) + 1] = of[e][p].second;
        }
    }
    Call call{{&plan.record, nullptr, dtype, tokens, pairs.as<int32_t>(), rows.as<float>(), top_k,
               static_cast<int>(random.in(1, 3)), form},
              hidden, inner, random_values(random, static_cast<int64_t>(tokens) * hidden, dtype),
              random_values(random, static_cast<int64_t>(biases) * shapes[0][0], bias_dtype),
              random_values(random, static_cast<int64_t>(biases) * hidden, bias_dtype), bias_dtype};
    call.call.x = call.x.as();
    call.call.bias_dtype = bias_dtype;
    if (biased) {
        call.call.up_bias = call.up_bias.as();
        call.call.down_bias = call.down_bias.as();
    }
    for (int e = 0; e < count; ++e) {
        for (const auto& [at, bytes] : plan.gaps) ASAN_POISON_MEMORY_REGION(records[e].as() + at, bytes);
        if (!work[e].prefix_only) continue;
        for (const auto& [at, bytes] : plan.low) ASAN_POISON_MEMORY_REGION(records[e].as() + at, bytes);
    }
    fate::experts(call.call, work.data(), count);
    for (const Exact& record : records) ASAN_UNPOISON_MEMORY_REGION(record.as(), record.size());
    if (!planted.empty()) return;

    std::vector<bool> given(static_cast<size_t>(tokens) * top_k);
    for (int e = 0; e < count; ++e) {
        const Matrix up = plan.record.matrix(records[e].as(), 0, work[e].prefix_only);
        const Matrix down = plan.record.matrix(records[e].as(), 1, work[e].prefix_only);
        const size_t step = std::max<size_t>(1, of[e].size() / 4);
        for (size_t p = 0; p < of[e].size(); ++p) {
            const auto [token, rank] = of[e][p];
            given[token * top_k + rank] = true;
            if (p % step != 0) continue;
            const std::vector<Sum> exact = call.exact(up, down, work[e].number, token);
            const float* row = rows.as<float>() + (static_cast<int64_t>(token) * top_k + rank) * hidden;
            for (int h = 0; h < hidden; ++h) near("experts", row[h], exact[h].value, exact[h].size);
        }
    }
    for (size_t pair = 0; pair < given.size(); ++pair) {
        for (int h = 0; h < hidden; ++h) {
            const float value = rows.as<float>()[pair * hidden + h];
            if (std::isnan(value) == given[pair]) fail("rows of pairs, and no others, are set", value, given[pair], 0);
        }
    }
}

}  // namespace fuzz
