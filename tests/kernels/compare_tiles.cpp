// Compares the tile kernels of every instruction set that the processor has with the portable ones, bit for bit, at
// shapes with every tail of the packing. Prints what was compared, a name a line; exits with 1 at a difference. What
// the kernels read ends where an unreadable page begins.
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

std::vector<float> tile_of(const TileKernels& kernels, const Matrix& matrix, int row, int count, const Tokens& tokens) {
    std::vector<float> tile(kTileFloats, 0.0f);
    std::vector<char> scratch(kernels.scratch_bytes(matrix.groups) + 1);
    multiply(kernels, matrix, row, count, tokens, 0, tokens.count, tile.data(), scratch.data());
    std::vector<float> values;
    for (int t = 0; t < tokens.count; ++t) {
        values.insert(values.end(), tile.begin() + t * kTileRows, tile.begin() + t * kTileRows + count);
    }
    return values;
}

bool same_bits(const std::vector<float>& x, const std::vector<float>& y) {
    return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
}

// Every instruction set on one random matrix and some tokens, in both forms.
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
    const int num_blocks = blocks_of(count_tokens);
    Scratch& scratch = Scratch::reserve(rows_bytes(count_tokens, groups) + blocks_bytes(num_blocks, groups));
    const TokenRows quantized = take_rows(scratch, count_tokens, groups);
    const TokenBlocks blocks = take_blocks(scratch, num_blocks, groups);
    std::vector<TokenRow> token_rows;
    std::vector<float> values(static_cast<size_t>(groups) * kGroup);
    for (int t = 0; t < count_tokens; ++t) {
        for (float& value : values) value = below(8) == 0 ? 0.0f : uniform(-3.0f, 3.0f);
        quantize_row(values.data(), groups * kGroup, quantized, t);
        token_rows.push_back(quantized.row(t));
    }
    for (int b = 0; b < num_blocks; ++b) {
        const int first = b * kBlockTokens;
        interleave(token_rows.data() + first, std::min(count_tokens - first, kBlockTokens), blocks, b);
    }
    const Tokens in_rows{count_tokens, token_rows.data(), blocks, false};
    const Tokens in_blocks{count_tokens, token_rows.data(), blocks, true};
    const int row = static_cast<int>(below(rows)), count = std::min(rows - row, kTileRows);
    const std::vector<float> expected = tile_of(kPortableTiles, matrix, row, count, in_rows);
    for (const TileKernels* kernels : available_tile_kernels()) {
        const bool blocked = kernels->blocks != nullptr;
        if (!same_bits(tile_of(*kernels, matrix, row, count, in_rows), expected) ||
            (blocked && !same_bits(tile_of(*kernels, matrix, row, count, in_blocks), expected))) {
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
            const int tokens = groups % 3 == 0 ? 1 : 1 + static_cast<int>(below(groups % 8 == 0 ? kTileTokens : 20));
            if (!compare(mode, 1 + static_cast<int>(below(21)), groups, tokens)) return 1;
        }
    }
    for (const TileKernels* kernels : available_tile_kernels()) std::printf("%s\n", kernels->name);
    return 0;
}
