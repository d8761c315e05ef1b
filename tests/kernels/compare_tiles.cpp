// Compares the tile kernels of every instruction set that the processor has with the portable ones, bit for bit, at
// shapes with every tail of the packing. Prints what was compared, a name a line; exits with 1 at a difference. What
// the kernels read, and their scratch and tile, end where an unreadable page begins.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "tokens.h"

using namespace fate;

namespace {

std::mt19937 g_random(7);

uint32_t below(uint32_t limit) { return g_random() % limit; }
float uniform(float least, float most) {
    return least + (most - least) * static_cast<float>(g_random() >> 8) * 0x1p-24f;
}

// `bytes` random bytes; the page behind them cannot be read.
class Guarded {
  public:
    explicit Guarded(size_t bytes) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        size_ = (bytes + 64 + page - 1) / page * page;
        base_ = static_cast<char*>(
            mmap(nullptr, size_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED || mprotect(base_ + size_, page, PROT_NONE) != 0) std::abort();
        data_ = base_ + size_ - bytes;
        for (size_t i = 0; i < bytes; ++i) data_[i] = static_cast<char>(g_random());
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() { munmap(base_, size_ + static_cast<size_t>(sysconf(_SC_PAGESIZE))); }
    template <typename T>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }

  private:
    char *base_, *data_;
    size_t size_;
};

using Multiply = decltype(TileKernels::rows);

std::vector<float> tile_of(const TileKernels& kernels, Multiply multiply, const Matrix& matrix, int row, int count,
                           const std::vector<TokenRow>& tokens) {
    const Guarded tile(kTileFloats * sizeof(float)), scratch(kernels.scratch_bytes(matrix.groups));
    multiply(matrix, row, count, tokens.data(), static_cast<int>(tokens.size()), tile.as<float>(), scratch.as<void>());
    std::vector<float> values;
    for (size_t t = 0; t < tokens.size(); ++t) {
        const float* of_token = tile.as<float>() + t * kTileRows;
        values.insert(values.end(), of_token, of_token + count);
    }
    return values;
}

bool same_bits(const std::vector<float>& x, const std::vector<float>& y) {
    return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
}

// Every instruction set on one random matrix and some tokens, row by row and in bands.
bool compare(Mode mode, int rows, int groups, int count_tokens) {
    const size_t plane = static_cast<size_t>(rows) * groups * (mode == Mode::kInt8 ? kGroup : kPlaneGroupBytes);
    const size_t affine_count = static_cast<size_t>(rows) * 2 * groups;
    const Guarded high(plane), low(plane), affine(affine_count * 2);
    for (size_t i = 0; i < affine_count; ++i) affine.as<uint16_t>()[i] = float_to_half(uniform(-2.0f, 2.0f));
    const Matrix matrix{high.as<uint8_t>(),
                        mode == Mode::kInt4 ? low.as<uint8_t>() : nullptr,
                        affine.as<uint16_t>(),
                        rows,
                        groups * kGroup,
                        groups,
                        uniform(0.5f, 2.0f),
                        mode};
    const TokenRows quantized = take_rows(Scratch::reserve(rows_bytes(count_tokens, groups)), count_tokens, groups);
    std::vector<TokenRow> tokens;
    std::vector<float> values(static_cast<size_t>(groups) * kGroup);
    for (int t = 0; t < count_tokens; ++t) {
        for (float& value : values) value = below(8) == 0 ? 0.0f : uniform(-3.0f, 3.0f);
        quantize_row(values.data(), groups * kGroup, quantized, t);
        tokens.push_back(quantized.row(t));
    }
    const int row = static_cast<int>(below(rows)), count = std::min(rows - row, kTileRows);
    const std::vector<float> expected = tile_of(kPortableTiles, kPortableTiles.rows, matrix, row, count, tokens);
    for (const TileKernels* kernels : available_tile_kernels()) {
        const bool same = same_bits(tile_of(*kernels, kernels->rows, matrix, row, count, tokens), expected) &&
                          (kernels->bands == nullptr ||
                           same_bits(tile_of(*kernels, kernels->bands, matrix, row, count, tokens), expected));
        if (!same) {
            std::fprintf(stderr, "%s differs: mode %d, rows %d, groups %d, tokens %d\n", kernels->name,
                         static_cast<int>(mode), rows, groups, count_tokens);
            return false;
        }
    }
    return true;
}

}  // namespace

int main() {
    for (const Mode mode : {Mode::kInt4, Mode::kInt2, Mode::kInt8}) {
        for (int groups = 1; groups <= 38; ++groups) {
            if (!compare(mode, 1 + static_cast<int>(below(40)), groups, 1 + groups % 10)) return 1;
            const int tokens = groups % 3 == 0 ? 1 : 1 + static_cast<int>(below(groups % 8 == 0 ? kTileTokens : 20));
            if (!compare(mode, 1 + static_cast<int>(below(groups % 5 == 0 ? 90 : 21)), groups, tokens)) return 1;
        }
    }
    for (const TileKernels* kernels : available_tile_kernels()) std::printf("%s\n", kernels->name);
    return 0;
}
