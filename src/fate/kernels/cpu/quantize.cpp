#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "tokens.h"

// Into every clone, so that the clone's instruction set is theirs too.
#define FATE_INLINE [[gnu::always_inline]] inline

namespace fate {

namespace {

constexpr int kItemRows = 16;

// One group of weights; columns beyond the matrix repeat the first, with `valid` 0.
struct Group {
    alignas(64) float w[kGroup];
    alignas(64) float valid[kGroup];
    float count;
};

struct Affine {
    float scale, offset;
};

// Sums 64 terms in an order that does not depend on the vector width.
FATE_INLINE float fold(float* lane) {
    for (int half = kLanes / 2; half >= 1; half /= 2) {
        for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    return lane[0];
}

FATE_INLINE float greater(float a, float b) { return a > b ? a : b; }
FATE_INLINE float lesser(float a, float b) { return a < b ? a : b; }

// The extreme of 64 values, lane by lane: compilers do not reorder a chain of comparisons by themselves.
template <float (*choose)(float, float)>
FATE_INLINE float extreme(const float* values) {
    float lane[kLanes];
    for (int j = 0; j < kLanes; ++j) lane[j] = values[j];
    for (int c = kLanes; c < kGroup; c += kLanes) {
        for (int j = 0; j < kLanes; ++j) lane[j] = choose(values[c + j], lane[j]);
    }
    for (int half = kLanes / 2; half >= 1; half /= 2) {
        for (int j = 0; j < half; ++j) lane[j] = choose(lane[j + half], lane[j]);
    }
    return lane[0];
}

FATE_INLINE float least(const Group& group) { return extreme<lesser>(group.w); }
FATE_INLINE float most(const Group& group) { return extreme<greater>(group.w); }

FATE_INLINE float round_code(float value, float levels) {
    const float code = round_even(value);
    return code < 0.0f ? 0.0f : code > levels ? levels : code;
}

// HQQ's proximal step sign(x) * relu(|x| - |x|^(p - 1) / beta). Weights within [-1, 1] hardly ever get here: a residual
// below beta^(-1 / (2 - p)), 0.17 at the defaults, shrinks to zero.
float shrink(float x, float p, float beta) {
    const float magnitude = std::fabs(x);
    const float left = magnitude - std::pow(magnitude, p - 1.0f) / beta;
    return left > 0.0f ? std::copysign(left, x) : 0.0f;
}

// Residuals up to this shrink to zero in every iteration, with room for rounding.
float never_shrinks(const QuantizeSettings& settings) {
    const double beta = settings.beta * std::max(1.0, std::pow(settings.kappa, settings.iterations));
    return 0.999f * static_cast<float>(std::pow(beta, -1.0 / (2.0 - settings.p)));
}

// hqq.py's solve for one group. `zero` is relative: codes are round((w - low) / scale + zero).
FATE_INLINE Affine solve_hqq(const Group& group, float levels, const QuantizeSettings& settings, float harmless) {
    const float low = least(group), spread = most(group) - low;
    if (!(spread > 1e-30f)) return {0.0f, low};
    const float scale = spread / levels, inverse = 1.0f / scale;
    float scaled[kGroup];
    for (int i = 0; i < kGroup; ++i) scaled[i] = (group.w[i] - low) * inverse;
    const float shift = -low * inverse;
    float zero = std::fabs(shift) < 0x1p22f ? round_even(shift) - shift : 0.0f;
    float best_zero = zero, best_error = INFINITY, beta = settings.beta;
    for (int iteration = 0; iteration < settings.iterations; ++iteration) {
        float residual[kGroup], size[kGroup], error_lane[kLanes] = {}, zero_lane[kLanes] = {};
        for (int c = 0; c < kGroup; c += kLanes) {
            for (int j = 0; j < kLanes; ++j) {
                const float code = round_code(scaled[c + j] + zero, levels);
                const float off = scaled[c + j] + zero - code;
                residual[c + j] = off;
                size[c + j] = std::fabs(off);
                error_lane[j] += size[c + j] * group.valid[c + j];
                zero_lane[j] += (code - scaled[c + j]) * group.valid[c + j];
            }
        }
        const float error = fold(error_lane);
        if (!(error < best_error)) break;
        best_error = error;
        best_zero = zero;
        float total = fold(zero_lane);
        const float largest = extreme<greater>(size) * scale;
        if (largest > harmless && std::pow(largest, 2.0f - settings.p) * beta > 1.0f) {
            for (int i = 0; i < kGroup; ++i) {
                total += shrink(residual[i] * scale, settings.p, beta) * inverse * group.valid[i];
            }
        }
        zero = total / group.count;
        beta *= settings.kappa;
    }
    return {scale, low - best_zero * scale};
}

FATE_INLINE Affine solve_minmax(const Group& group, float levels) {
    const float low = least(group), spread = most(group) - low;
    if (!(spread > 1e-30f)) return {0.0f, low};
    return {spread / levels, low};
}

// Codes in the order of a packed row -> both planes.
void pack_row(const uint8_t* codes, int groups, uint8_t* high, uint8_t* low) {
    const int bytes = groups * kPlaneGroupBytes;
    for (int at = 0, run = 64; at < bytes; at += run) {
        while (bytes - at < run) run /= 2;
        const uint8_t* part = codes + 4 * at;
        for (int j = 0; j < run; ++j) {
            const unsigned a = part[j], b = part[run + j], c = part[2 * run + j], d = part[3 * run + j];
            high[at + j] = static_cast<uint8_t>(a >> 2 | (b >> 2) << 2 | (c >> 2) << 4 | (d >> 2) << 6);
            low[at + j] = static_cast<uint8_t>((a & 3) | (b & 3) << 2 | (c & 3) << 4 | (d & 3) << 6);
        }
    }
}

FATE_INLINE void load_group(const float* row, int at, int cols, Group& group) {
    const int count = cols - at < kGroup ? cols - at : kGroup;
    for (int i = 0; i < kGroup; ++i) {
        group.w[i] = row[at + (i < count ? i : 0)];
        group.valid[i] = i < count ? 1.0f : 0.0f;
    }
    group.count = static_cast<float>(count);
}

}  // namespace

// One row of weights within [-1, 1] -> codes [groups * 64] and affine [2, groups]; adds to the slope's sums.
FATE_CLONES
void quantize_row_codes(const float* row, int cols, bool eight_bits, float headroom, const QuantizeSettings& settings,
                        float harmless, uint8_t* codes, uint16_t* affine, SlopeSums* sums) {
    const int groups = (cols + kGroup - 1) / kGroup;
    const float levels = eight_bits ? 255.0f : 15.0f;
    for (int g = 0; g < groups; ++g) {
        Group group;
        load_group(row, g * kGroup, cols, group);
        const Affine exact =
            eight_bits ? solve_minmax(group, levels) : solve_hqq(group, levels, settings, harmless);
        affine[g] = float_to_half(exact.scale * headroom);
        affine[groups + g] = float_to_half(exact.offset * headroom);
        const float scale = half_to_float(affine[g]) / headroom, offset = half_to_float(affine[groups + g]) / headroom;
        const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        float square_lane[kLanes] = {}, product_lane[kLanes] = {};
        for (int c = 0; c < kGroup; c += kLanes) {
            for (int j = 0; j < kLanes; ++j) {
                const float w = group.w[c + j] * group.valid[c + j];
                const float code = round_code((group.w[c + j] - offset) * inverse, levels) * group.valid[c + j];
                codes[g * kGroup + c + j] = static_cast<uint8_t>(static_cast<int>(code));
                const float coarse = scale * static_cast<float>((static_cast<int>(code) & ~3)) + scale * 1.5f + offset;
                square_lane[j] += w * w;
                product_lane[j] += w * coarse;
            }
        }
        sums->squares += fold(square_lane);
        sums->products += fold(product_lane);
    }
}

FATE_CLONES
static void scale_row(float* row, int cols, float factor) {
    for (int i = 0; i < cols; ++i) row[i] *= factor;
}

// The largest bit pattern without its sign: the largest magnitude's, or that of an infinity or NaN if there is one.
FATE_CLONES
static uint16_t largest_bits(const uint16_t* values, int64_t count) {
    uint16_t largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max<uint16_t>(largest, values[i] & 0x7fff);
    return largest;
}

FATE_CLONES
static uint32_t largest_bits(const uint32_t* values, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max<uint32_t>(largest, values[i] & 0x7fffffffu);
    return largest;
}

float largest_magnitude(const void* weights, DType dtype, int64_t pitch, int rows, int cols) {
    float largest = 0.0f;
    for (int r = 0; r < rows; ++r) {
        const void* row = static_cast<const char*>(weights) + r * pitch * item_bytes(dtype);
        const float value = dtype == DType::kFloat32
                                ? std::bit_cast<float>(largest_bits(static_cast<const uint32_t*>(row), cols))
                            : dtype == DType::kBFloat16
                                ? bfloat16_to_float(largest_bits(static_cast<const uint16_t*>(row), cols))
                                : half_to_float(largest_bits(static_cast<const uint16_t*>(row), cols));
        if (!(value <= largest)) largest = value;
        if (!std::isfinite(largest)) break;
    }
    return largest;
}

SlopeSums quantize_matrix(const void* weights, DType dtype, int64_t pitch, int rows, int cols, float inverse_unit,
                          int headroom, const QuantizeSettings& settings, const PackedSections& out, int threads) {
    const int groups = (cols + kGroup - 1) / kGroup;
    const int team = static_cast<int64_t>(rows) * cols < kMinParallelWork ? 1 : threads;
    std::vector<float> floats(static_cast<size_t>(team) * cols);
    const int64_t padded = static_cast<int64_t>(groups) * kGroup;
    std::vector<uint8_t> codes(2 * team * padded);  // in the order of the columns, and of a packed row
    std::vector<SlopeSums> row_sums(rows, SlopeSums{0.0, 0.0});
    const float factor = std::ldexp(1.0f, headroom), harmless = never_shrinks(settings);
    parallel_for((rows + kItemRows - 1) / kItemRows, team, [&](int64_t item, int thread) {
        float* row = floats.data() + static_cast<int64_t>(thread) * cols;
        uint8_t *own = codes.data() + 2 * thread * padded, *ordered = own + padded;
        const int first = static_cast<int>(item) * kItemRows;
        for (int r = first; r < std::min(first + kItemRows, rows); ++r) {
            load_floats(static_cast<const char*>(weights) + r * pitch * item_bytes(dtype), dtype, cols, row);
            scale_row(row, cols, inverse_unit);
            quantize_row_codes(row, cols, out.low == nullptr, factor, settings, harmless, own,
                               out.affine + static_cast<int64_t>(r) * 2 * groups, &row_sums[r]);
            const int64_t width = static_cast<int64_t>(groups) * kPlaneGroupBytes;
            order_as_packed(own, groups, out.low == nullptr ? out.high + r * padded : ordered);
            if (out.low != nullptr) pack_row(ordered, groups, out.high + r * width, out.low + r * width);
        }
    });
    SlopeSums total{0.0, 0.0};
    for (const SlopeSums& sums : row_sums) {
        total.squares += sums.squares;
        total.products += sums.products;
    }
    return total;
}

}  // namespace fate
