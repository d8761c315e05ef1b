#include "cases.h"

#include <numeric>

#include "attention.h"
#include "gate.h"
#include "linear.h"
#include "quantize.h"
#include "rows.h"
#include "transfer.h"

namespace fuzz {

using fate::DType;
using fate::Matrix;
using fate::Mode;

namespace {

int any_tokens(Random& random) {
    if (random.chance(0.6)) return static_cast<int>(random.in(1, 9));
    return static_cast<int>(random.chance(0.9) ? random.in(1, 70) : random.in(100, 600));
}

std::vector<float> floats_of(const Exact& x, int64_t first, int64_t count, DType dtype) {
    std::vector<float> values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = get(x.as(), first + i, dtype);
    return values;
}

}  // namespace

void linear(Random& random, const std::string& planted) {
    const int rows = random.size(260), cols = random.size(random.chance(0.3) ? 3000 : 800), tokens = any_tokens(random);
    const DType dtype = any_dtype(random);
    const Packed packed(random, rows, cols, planted);
    const int64_t item = fate::item_bytes(dtype);
    const Exact full = random_values(random, static_cast<int64_t>(tokens) * cols, dtype);
    const Exact x(full.size() - (planted == "x" ? item : 0));
    std::memcpy(x.as(), full.as(), x.size());
    const bool biased = planted == "bias" || random.chance(0.4);
    const Exact bias = random_values(random, rows - (planted == "bias" ? 1 : 0), dtype);
    const Exact out(static_cast<int64_t>(tokens) * rows * item - (planted == "out" ? item : 0));
    const int threads = static_cast<int>(random.in(1, 3));
    const fate::Product product{packed.matrix, biased ? bias.as() : nullptr, out.as()};
    fate::linear({product}, x.as(), dtype, tokens, threads);
    if (!planted.empty()) return;
    const Packed other(random, random.size(260), cols, "");  // beside others, the same bits
    const Exact before(tokens * other.matrix.rows * item), again(out.size()), after(before.size());
    fate::linear({{other.matrix, nullptr, before.as()}, {product.matrix, product.bias, again.as()},
                  {other.matrix, nullptr, after.as()}}, x.as(), dtype, tokens, threads);
    near("linear, a product alone and beside others", std::memcmp(out.as(), again.as(), out.size()), 0, 0);
    near("linear, one matrix twice", std::memcmp(before.as(), after.as(), before.size()), 0, 0);

    const std::vector<double> weights = dequantize(packed.matrix);
    for (int64_t t = 0; t < tokens; t += tokens > 20 ? random.in(1, 40) : 1) {
        const std::vector<double> values = rounded_to_int8(floats_of(x, t * cols, cols, dtype));
        double size = 0;
        for (const double value : values) size += std::fabs(value) * 3 * packed.matrix.gain;
        for (int64_t row = 0; row < rows; ++row) {
            const double added = biased ? get(bias.as(), row, dtype) : 0.0;
            const double exact =
                std::inner_product(values.begin(), values.end(), weights.begin() + row * cols, 0.0) + added;
            near("linear", get(out.as(), t * rows + row, dtype), exact,
                 2e-5 * size + 1e-6 + rounding(dtype) * std::fabs(exact));
        }
    }
}

void gather(Random& random, const std::string&) {
    const int rows = random.size(90), cols = random.size(2300), count = static_cast<int>(random.in(0, 40));
    const DType dtype = any_dtype(random);
    const Packed packed(random, rows, cols, "");
    const Exact ids(count * 8), out(static_cast<int64_t>(count) * cols * fate::item_bytes(dtype));
    for (int i = 0; i < count; ++i) ids.as<int64_t>()[i] = random.in(0, rows - 1);
    fate::gather_rows(packed.matrix, ids.as<int64_t>(), count, dtype, out.as(), static_cast<int>(random.in(1, 3)));
    for (int i = 0; i < count; ++i) {
        for (int64_t col = 0; col < cols; ++col) {
            const double exact = weight(packed.matrix, ids.as<int64_t>()[i], col);
            near("gather", get(out.as(), static_cast<int64_t>(i) * cols + col, dtype), exact,
                 1e-6 + rounding(dtype) * std::fabs(exact));
        }
    }
}

void reduce(Random& random, const std::string&) {
    const int tokens = static_cast<int>(random.in(1, 30)), top_k = static_cast<int>(random.in(1, 9));
    const int hidden = random.size(2500);
    const DType given = any_dtype(random), dtype = any_dtype(random);
    const Exact rows = random_values(random, static_cast<int64_t>(tokens) * top_k * hidden, DType::kFloat32);
    const Exact weights = random_values(random, tokens * top_k, given);
    const Exact out(static_cast<int64_t>(tokens) * hidden * fate::item_bytes(dtype));
    fate::reduce_rows(rows.as<float>(), weights.as(), given, tokens, top_k, hidden, dtype, out.as(),
                      static_cast<int>(random.in(1, 3)));
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < hidden; ++h) {
            double exact = 0, size = 0;
            for (int64_t rank = t * top_k; rank < (t + 1) * top_k; ++rank) {
                const double term =
                    static_cast<double>(get(weights.as(), rank, given)) * rows.as<float>()[rank * hidden + h];
                exact += term;
                size += std::fabs(term);
            }
            near("reduce", get(out.as(), t * hidden + h, dtype), exact, 1e-6 * size + 1e-7 + rounding(dtype) * size);
        }
    }
}

void attend(Random& random, const std::string&) {
    const int64_t batch = random.in(1, 3), kv_heads = random.in(1, 4);
    const int64_t heads = kv_heads * random.in(1, random.chance(0.1) ? 20 : 4);
    const int64_t length = random.chance(0.05) ? random.in(1000, 9000) : random.size(400);
    const int key_dim = random.size(140), value_dim = random.size(140);
    const DType dtype = any_dtype(random);
    struct Strides {
        int64_t batch, head, position;
    };
    const auto strides = [&](int dim) {  // positions within a head, or heads within a position
        const int64_t room = length + random.in(0, 3);
        if (random.chance(0.5)) return Strides{kv_heads * room * dim, room * dim, dim};
        return Strides{kv_heads * room * dim, dim, kv_heads * dim};
    };
    const Strides k = strides(key_dim), v = strides(value_dim);
    const auto cache = [&](const Strides& s, int dim) {  // ends with its last position
        const int64_t last = (batch - 1) * s.batch + (kv_heads - 1) * s.head + (length - 1) * s.position;
        return random_values(random, last + dim, dtype);
    };
    const Exact q = random_values(random, batch * heads * key_dim, dtype), keys = cache(k, key_dim);
    const Exact values = cache(v, value_dim), out(batch * heads * value_dim * fate::item_bytes(dtype));
    const float scale = 0.3f / std::sqrt(static_cast<float>(key_dim));
    std::vector<fate::CacheRow> rows;
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t item = fate::item_bytes(dtype);
        rows.push_back({keys.as() + b * k.batch * item, values.as() + b * v.batch * item, length});
    }
    fate::attend({q.as(), rows.data(), {k.head, k.position}, {v.head, v.position}, dtype, batch, heads, kv_heads,
                  key_dim, value_dim, scale, out.as(), static_cast<int>(random.in(1, 3))});
    for (int64_t row = 0; row < batch * heads; ++row) {
        const int64_t entry = row / heads, head = row % heads / (heads / kv_heads);
        std::vector<double> share(length);
        for (int64_t at = 0; at < length; ++at) {
            const int64_t key = entry * k.batch + head * k.head + at * k.position;
            for (int64_t i = 0; i < key_dim; ++i) {
                const double query = get(q.as(), row * key_dim + i, dtype);
                share[at] += scale * query * get(keys.as(), key + i, dtype);
            }
        }
        const double top = *std::max_element(share.begin(), share.end());
        for (double& value : share) value = std::exp(value - top);
        const double total = std::accumulate(share.begin(), share.end(), 0.0);
        for (int64_t i = 0; i < value_dim; ++i) {
            double exact = 0, size = 0;
            for (int64_t at = 0; at < length; ++at) {
                const double value = get(values.as(), entry * v.batch + head * v.head + at * v.position + i, dtype);
                exact += share[at] / total * value;
                size += share[at] / total * std::fabs(value);
            }
            near("attend", get(out.as(), row * value_dim + i, dtype), exact,
                 3e-5 * size + 1e-6 + rounding(dtype) * size);
        }
    }
}

void quantize(Random& random, const std::string&) {
    const int rows = random.size(40), cols = random.size(2300);
    const int64_t pitch = cols + random.in(0, 9);
    const bool int8 = random.chance(0.4);
    const DType dtype = any_dtype(random);
    const Exact weights = random_values(random, (rows - 1) * pitch + cols, dtype);
    const float largest = fate::largest_magnitude(weights.as(), dtype, pitch, rows, cols);
    const float unit = std::exp2(std::ceil(std::log2(std::max(largest, 1e-6f))));
    const Sections bytes = sections_of(rows, cols, int8);
    const Exact high(bytes.high), affine(bytes.affine), low(bytes.low);
    fate::quantize_matrix(weights.as(), dtype, pitch, rows, cols, 1.0f / unit, 0, {20, 0.7f, 10.0f, 1.01f},
                          {high.as(), affine.as<uint16_t>(), int8 ? nullptr : low.as()},
                          static_cast<int>(random.in(1, 3)));
    const Matrix matrix{high.as(), int8 ? nullptr : low.as(), affine.as<uint16_t>(), rows, cols,
                        static_cast<int>(groups_of(cols)), unit, int8 ? Mode::kInt8 : Mode::kInt4};
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t col = 0; col < cols; ++col) {
            const float given = get(weights.as(), row * pitch + col, dtype);
            if (std::fabs(given) > largest) fail("largest_magnitude", largest, given, 0);
            const float step = fate::half_to_float(matrix.affine_row(static_cast<int>(row))[col / fate::kGroup]);
            near("quantize", weight(matrix, row, col), given, unit * (1.5 * step + 0.002));
        }
    }
}

void rank(Random& random, const std::string&) {
    const int experts = static_cast<int>(random.in(1, 80)), hidden = random.size(600);
    const int limit = static_cast<int>(random.in(1, 90));
    const DType dtype = any_dtype(random);
    const int64_t tokens = any_tokens(random), item = fate::item_bytes(dtype), token = random.in(0, tokens - 1);
    const Exact weights = random_values(random, static_cast<int64_t>(experts) * hidden, dtype, 0.05f);
    const Exact all = random_values(random, tokens * hidden, dtype), x(hidden * item);
    std::memcpy(x.as(), all.as() + token * hidden * item, x.size());
    const int threads = static_cast<int>(random.in(1, 3));
    const auto ranked =
        fate::rank_experts(weights.as(), all.as(), dtype, experts, hidden, tokens, limit, threads)[token];
    if (ranked != fate::rank_experts(weights.as(), x.as(), dtype, experts, hidden, 1, limit, 1)[0])
        fail("rank, a token alone and beside others", 1, 0, 0);
    if (static_cast<int>(ranked.size()) != std::min(experts, limit)) fail("rank", ranked.size(), experts, 0);
    std::vector<double> likely(experts);
    for (int64_t e = 0; e < experts; ++e) {
        for (int64_t i = 0; i < hidden; ++i) {
            likely[e] += static_cast<double>(get(weights.as(), e * hidden + i, dtype)) * get(x.as(), i, dtype);
        }
    }
    const double top = *std::max_element(likely.begin(), likely.end());
    for (double& value : likely) value = std::exp(value - top);
    const double total = std::accumulate(likely.begin(), likely.end(), 0.0);
    for (const auto& [expert, probability] : ranked) near("rank", probability, likely[expert] / total, 1e-3);
}

void copy(Random& random, const std::string&) {
    const int64_t length = random.in(0, 20000), chunk = random.in(1, 5000);
    const Exact from = random_values(random, length / 4 + 1, DType::kFloat32), source(length), target(length);
    std::memcpy(source.as(), from.as(), length);
    fate::Progress progress{0, 0};
    fate::copy_paced(target.as(), source.as(), length, chunk, 0.0, 0.0, &progress);
    if (progress.done != length || std::memcmp(target.as(), source.as(), length) != 0) {
        fail("copy", progress.done, length, 0);
    }
}

}  // namespace fuzz
