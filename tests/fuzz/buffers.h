// What the fuzz driver is made of: random numbers, buffers that end where their contents do, packed matrices in such
// buffers, and the same matrices in float64.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "layout.h"
#include "numeric.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, size) ((void)(at), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(at, size) ((void)(at), (void)(size))
#endif

namespace fuzz {

struct Random {
    std::mt19937_64 engine;

    int64_t in(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }
    bool chance(double p) { return std::uniform_real_distribution<>(0, 1)(engine) < p; }
    float normal() { return std::normal_distribution<float>()(engine); }
    // Mostly small, sometimes at or beside a multiple of 64, sometimes large.
    int size(int most) {
        if (chance(0.4)) return static_cast<int>(in(1, std::min(most, 70)));
        const int64_t groups = in(1, chance(0.7) ? 12 : 35);
        if (chance(0.5)) return static_cast<int>(std::min<int64_t>(most, 64 * groups + in(-1, 1)));
        return static_cast<int>(in(1, most));
    }
    template <typename T>
    T one_of(std::initializer_list<T> choices) {
        return choices.begin()[in(0, static_cast<int64_t>(choices.size()) - 1)];
    }
};

// Whether buffers end at a page that cannot be read instead of on the heap: masked vector loads pass by the sanitizer.
inline bool g_guarded = false;

struct Free {
    void* pages = nullptr;
    int64_t mapped = 0;
    void operator()(uint8_t* at) const {
        if (pages != nullptr) munmap(pages, mapped);
        else std::free(at);
    }
};

// `bytes` bytes, no more: what is read or written beyond ends the process.
class Exact {
  public:
    explicit Exact(int64_t bytes) : size_(bytes) {
        if (g_guarded && bytes % 4 == 0) {
            const int64_t room = (bytes + kPage - 1) / kPage * kPage;
            void* pages = mmap(nullptr, room + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (pages == MAP_FAILED || mprotect(static_cast<char*>(pages) + room, kPage, PROT_NONE) != 0) std::abort();
            uint8_t* at = static_cast<uint8_t*>(pages) + room - bytes;
            data_ = std::unique_ptr<uint8_t, Free>(at, Free{pages, room + kPage});
        } else {
            void* at = nullptr;
            if (posix_memalign(&at, 64, std::max<int64_t>(bytes, 1)) != 0) std::abort();
            data_ = std::unique_ptr<uint8_t, Free>(static_cast<uint8_t*>(at));
        }
    }
    template <typename T = uint8_t>
    T* as() const { return reinterpret_cast<T*>(data_.get()); }
    int64_t size() const { return size_; }

  private:
    static constexpr int64_t kPage = 4096;

    std::unique_ptr<uint8_t, Free> data_;
    int64_t size_;
};

inline void put(void* to, int64_t index, fate::DType dtype, float value) {
    if (dtype == fate::DType::kFloat32) static_cast<float*>(to)[index] = value;
    else static_cast<uint16_t*>(to)[index] =
        dtype == fate::DType::kBFloat16 ? fate::float_to_bfloat16(value) : fate::float_to_half(value);
}

inline float get(const void* from, int64_t index, fate::DType dtype) {
    if (dtype == fate::DType::kFloat32) return static_cast<const float*>(from)[index];
    const uint16_t bits = static_cast<const uint16_t*>(from)[index];
    return dtype == fate::DType::kBFloat16 ? fate::bfloat16_to_float(bits) : fate::half_to_float(bits);
}

// Of a number that a dtype has rounded.
inline double rounding(fate::DType dtype) {
    return dtype == fate::DType::kFloat32 ? 1e-6 : dtype == fate::DType::kBFloat16 ? 0.004 : 0.0006;
}

// Random values [count], some exact zeros, some much larger than the others.
inline Exact random_values(Random& random, int64_t count, fate::DType dtype, float scale = 1.0f) {
    Exact values(count * fate::item_bytes(dtype));
    for (int64_t i = 0; i < count; ++i) {
        const float spread = random.chance(0.02) ? 20.0f : random.chance(0.05) ? 0.0f : 1.0f;
        put(values.as(), i, dtype, scale * spread * random.normal());
    }
    return values;
}

inline fate::DType any_dtype(Random& random) {
    return random.one_of({fate::DType::kFloat32, fate::DType::kBFloat16, fate::DType::kFloat16});
}

inline int64_t groups_of(int64_t cols) { return (cols + fate::kGroup - 1) / fate::kGroup; }

struct Sections {
    int64_t high, affine, low;  // bytes of each; low: 0 for int8
};

inline Sections sections_of(int rows, int cols, bool int8) {
    const int64_t groups = groups_of(cols), plane = rows * groups * (int8 ? fate::kGroup : fate::kPlaneGroupBytes);
    return {plane, rows * groups * 4, int8 ? 0 : plane};
}

// Random codes, and scales that keep a row's weights around 1 / sqrt(cols).
inline void fill(Random& random, uint8_t* high, uint8_t* affine, uint8_t* low, int rows, int cols, bool int8) {
    const Sections bytes = sections_of(rows, cols, int8);
    for (int64_t i = 0; i < bytes.high; ++i) high[i] = static_cast<uint8_t>(random.engine());
    for (int64_t i = 0; i < bytes.low; ++i) low[i] = static_cast<uint8_t>(random.engine());
    const int64_t groups = groups_of(cols);
    const float levels = int8 ? 255.0f : 15.0f;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t g = 0; g < groups; ++g) {
            const float scale = (0.5f + std::fabs(random.normal())) / levels;
            const float offset = -scale * levels / 2 + 0.1f * random.normal();
            put(affine, row * 2 * groups + g, fate::DType::kFloat16, scale);
            put(affine, row * 2 * groups + groups + g, fate::DType::kFloat16, offset);
        }
    }
}

// Readable bytes before the scales, as in every record (its planes): the kernels may read 14 of them (see simd.h).
inline constexpr int64_t kBefore = 64;

// A matrix whose three sections lie in buffers of their own.
struct Packed {
    Exact high, affine, low;
    fate::Matrix matrix;

    Packed(Random& random, int rows, int cols, const std::string& planted)
        : Packed(random, rows, cols, random.one_of({fate::Mode::kInt4, fate::Mode::kInt2, fate::Mode::kInt8}),
                 planted) {}

    Packed(Random& random, int rows, int cols, fate::Mode mode, const std::string& planted)
        : high(sections_of(rows, cols, mode == fate::Mode::kInt8).high - (planted == "high" ? 1 : 0)),
          affine(kBefore + sections_of(rows, cols, mode == fate::Mode::kInt8).affine - (planted == "affine" ? 4 : 0)),
          low(mode == fate::Mode::kInt4 ? sections_of(rows, cols, false).low - (planted == "low" ? 1 : 0) : 0),
          matrix{high.as(), mode == fate::Mode::kInt4 ? low.as() : nullptr, scales(), rows, cols,
                 static_cast<int>(groups_of(cols)), 1.0f / std::sqrt(static_cast<float>(cols)), mode} {
        if (!planted.empty()) return;  // what the kernel would read, this would write
        Exact unread(mode == fate::Mode::kInt2 ? sections_of(rows, cols, false).low : 0);
        fill(random, high.as(), affine.as() + kBefore, mode == fate::Mode::kInt4 ? low.as() : unread.as(), rows, cols,
             mode == fate::Mode::kInt8);
    }

    const uint16_t* scales() const { return reinterpret_cast<const uint16_t*>(affine.as() + kBefore); }
};

// Weight (row, col) as the format's specification has it.
inline double weight(const fate::Matrix& m, int64_t row, int64_t col) {
    const int64_t group = col / fate::kGroup;
    int64_t first = group / 16 * 16, size = 16;  // the chunk of 16, 8, 4, 2 or 1 groups that the column is in
    while (m.groups - first < size || group >= first + size) {
        if (m.groups - first >= size) first += size;
        else size /= 2;
    }
    const int64_t four = col % fate::kGroup / 4, number = (four * size + group - first) * 4 + col % 4;
    double code;
    if (m.mode == fate::Mode::kInt8) code = m.high_row(static_cast<int>(row))[first * fate::kGroup + number];
    else {
        const int64_t run = size < 4 ? size * fate::kPlaneGroupBytes : 64, within = number % (4 * run);
        const int64_t byte = first * fate::kPlaneGroupBytes + number / (4 * run) * run + within % run;
        const int64_t shift = 2 * (within / run);
        const int high = m.high_row(static_cast<int>(row))[byte] >> shift & 3;
        code = m.mode == fate::Mode::kInt2 ? 4 * high + 1.5
                                           : 4 * high + (m.low_row(static_cast<int>(row))[byte] >> shift & 3);
    }
    const uint16_t* affine = m.affine_row(static_cast<int>(row));
    return m.gain * (fate::half_to_float(affine[group]) * code + fate::half_to_float(affine[m.groups + group]));
}

inline std::vector<double> dequantize(const fate::Matrix& m) {
    std::vector<double> weights(static_cast<int64_t>(m.rows) * m.cols);
    for (int64_t row = 0; row < m.rows; ++row) {
        for (int64_t col = 0; col < m.cols; ++col) weights[row * m.cols + col] = weight(m, row, col);
    }
    return weights;
}

// Values [cols] as int8 per group leaves them.
inline std::vector<double> rounded_to_int8(const std::vector<float>& values) {
    std::vector<double> out(values.size());
    for (size_t first = 0; first < values.size(); first += fate::kGroup) {
        const size_t end = std::min(values.size(), first + fate::kGroup);
        float most = 0.0f;
        for (size_t i = first; i < end; ++i) most = std::max(most, std::fabs(values[i]));
        const float inverse = most < 1e-30f ? 0.0f : 127.0f / most;
        for (size_t i = first; i < end; ++i) {
            out[i] = static_cast<double>(fate::round_even(values[i] * inverse)) * (most / 127.0f);
        }
    }
    return out;
}

inline char g_round[96] = "";  // what is running, for the message that ends it

[[noreturn]] inline void fail(const char* what, double got, double expected, double bound) {
    std::fprintf(stderr, "%s: %s: got %.9g, expected %.9g within %.3g\n", g_round, what, got, expected, bound);
    std::exit(1);
}

inline void near(const char* what, double got, double expected, double bound) {
    if (!(std::fabs(got - expected) <= bound)) fail(what, got, expected, bound);
}

}  // namespace fuzz
