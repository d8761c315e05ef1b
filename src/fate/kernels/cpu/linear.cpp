#include "linear.h"

#include "tokens.h"

namespace fate {

namespace {

constexpr int kMaxTokens = 512;  // tokens quantized at a time, which bounds the scratch

// Memory of one pass over at most kMaxTokens tokens.
struct LinearScratch {
    TokenRows quantized;
    TokenRow* rows;
    float* floats;  // [threads][max(cols, kTileFloats + kTileRows)]
    char* kernel;   // [threads][kernel_bytes]
    int64_t floats_each, kernel_bytes;

    LinearScratch(int cols, int groups, int tokens, int threads)
        : floats_each(floats_for(cols)), kernel_bytes(kernel_bytes_for(groups)) {
        Scratch& scratch = Scratch::reserve(bytes_for(cols, groups, tokens, threads));
        quantized = take_rows(scratch, tokens, groups);
        rows = scratch.take<TokenRow>(tokens);
        floats = scratch.take<float>(threads * floats_each);
        kernel = scratch.take<char>(threads * kernel_bytes);
    }

    static int64_t bytes_for(int cols, int groups, int tokens, int threads) {
        return rows_bytes(tokens, groups) + Scratch::bytes_of<TokenRow>(tokens) +
               Scratch::bytes_of<float>(threads * floats_for(cols)) + threads * kernel_bytes_for(groups);
    }

  private:
    static int64_t floats_for(int cols) { return round_up(std::max<int>(cols, kTileFloats + kTileRows), kLanes); }
    static int64_t kernel_bytes_for(int groups) { return Scratch::rounded(tile_kernels().scratch_bytes(groups)); }
};

struct LinearPass {
    std::initializer_list<Product> products;  // at least one, all of `cols` columns
    const char* x;
    DType dtype;
    int tokens;
    int64_t first_token;  // of the outputs' rows
    int cols, groups;

    void quantize(const LinearScratch& scratch, int token, float* floats) const {
        load_floats(x + static_cast<int64_t>(token) * cols * item_bytes(dtype), dtype, cols, floats);
        quantize_row(floats, cols, scratch.quantized, token);
    }

    // Tile -> the product's out, with its bias, in the caller's dtype.
    void store(const Product& product, int row, int count, int first, int n, float* tile, float* bias_floats) const {
        const char* bias = static_cast<const char*>(product.bias);
        if (bias != nullptr)
            load_floats(bias + static_cast<int64_t>(row) * item_bytes(dtype), dtype, count, bias_floats);
        for (int t = 0; t < n; ++t) {
            float* values = tile + t * kTileRows;
            if (bias != nullptr) {
                for (int r = 0; r < count; ++r) values[r] += bias_floats[r];
            }
            const int64_t at = (first_token + first + t) * product.matrix.rows + row;
            store_floats(values, count, dtype, static_cast<char*>(product.out) + at * item_bytes(dtype));
        }
    }

    void run(int threads) const {
        const TileKernels& kernels = tile_kernels();
        const LinearScratch scratch(cols, groups, tokens, threads);
        const int token_items = (tokens + kTileTokens - 1) / kTileTokens;
        int64_t rows = 0, items = 0;
        for (const Product& product : products) rows += product.matrix.rows;
        const int per_item = item_rows(static_cast<int>(std::min<int64_t>(rows, 1 << 30)), threads,
                                       kernels.banded(products.begin()->matrix.mode, tokens));
        const auto items_of = [&](const Product& product) {
            return static_cast<int64_t>((product.matrix.rows + per_item - 1) / per_item) * token_items;
        };
        for (const Product& product : products) items += items_of(product);
        for (int t = 0; t < tokens; ++t) scratch.rows[t] = scratch.quantized.row(t);
        // Few tokens are quantized sooner than a helper comes.
        parallel_for(tokens, tokens > 2 ? threads : 1, [&](int64_t token, int thread) {
            quantize(scratch, static_cast<int>(token), scratch.floats + thread * scratch.floats_each);
        });
        parallel_for(items, threads, [&](int64_t item, int thread) {
            const Product* product = products.begin();
            for (int64_t n; item >= (n = items_of(*product)); ++product) item -= n;
            const int row = static_cast<int>(item / token_items) * per_item;
            const int first = static_cast<int>(item % token_items) * kTileTokens;
            const int count = std::min(product->matrix.rows - row, per_item);
            const int n = std::min(tokens - first, kTileTokens);
            float* floats = scratch.floats + thread * scratch.floats_each;
            kernels.multiply(product->matrix, row, count, scratch.rows + first, n, floats,
                             scratch.kernel + thread * scratch.kernel_bytes);
            store(*product, row, count, first, n, floats, floats + kTileFloats);
        });
    }
};

}  // namespace

int64_t linear_scratch_bytes(int cols, int64_t tokens, int threads) {
    return LinearScratch::bytes_for(cols, (cols + kGroup - 1) / kGroup,
                                    static_cast<int>(std::min<int64_t>(tokens, kMaxTokens)), threads);
}

void linear(std::initializer_list<Product> products, const void* x, DType dtype, int64_t tokens, int threads) {
    const Matrix& any = products.begin()->matrix;
    int64_t rows = 0;
    for (const Product& product : products) rows += product.matrix.rows;
    for (int64_t first = 0; first < tokens; first += kMaxTokens) {
        const int n = static_cast<int>(std::min<int64_t>(kMaxTokens, tokens - first));
        const char* rest = static_cast<const char*>(x) + first * any.cols * item_bytes(dtype);
        LinearPass{products, rest, dtype, n, first, any.cols, any.groups}.run(
            rows * any.cols * n < kMinParallelWork ? 1 : threads);
    }
}

}  // namespace fate
