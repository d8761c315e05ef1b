#include <cstring>

#include "linear.h"
#include "mixer.h"
#include "tokens.h"

namespace fate {

int64_t LatentAttention::scratch_bytes(int64_t rows, int threads) const {
    const int64_t spaces = rows * heads * latent_dim;
    return taken(rows * query_down.matrix.rows) + taken(rows * query.matrix.rows) + taken(rows * latent.matrix.rows) +
           taken(rows * heads * turned_dim) + taken(rows * heads * value_dim) + 2 * Scratch::bytes_of<float>(spaces) +
           Scratch::bytes_of<float>(rows * heads * plain_dim) +
           expand_bytes(rows, threads);
}

void LatentAttention::run(const MixerStep& step, Scratch& scratch) const {
    const int64_t rows = step.rows, head_rows = plain_dim + turned_dim, spaces = rows * heads * latent_dim;
    char *down = take(scratch, rows * query_down.matrix.rows), *queries = take(scratch, rows * query.matrix.rows);
    char* kept = take(scratch, rows * latent.matrix.rows);
    const Product to_kept{latent.matrix, latent.bias, kept};
    if (query_down.matrix.rows > 0) {
        linear({{query_down.matrix, query_down.bias, down}, to_kept}, step.x, dtype_, rows, step.threads);
        rms_norm(query_norm, down, dtype_, rows, down, step.threads);
        linear({{query.matrix, query.bias, queries}}, down, dtype_, rows, step.threads);
    } else {
        linear({{query.matrix, query.bias, queries}, to_kept}, step.x, dtype_, rows, step.threads);
    }
    char* turned = take(scratch, rows * heads * turned_dim);
    for (int64_t row = 0; row < rows; ++row) {
        char* own = kept + bytes(row * latent.matrix.rows);
        rms_norm(latent_norm, own, dtype_, 1, own, 1);
        rotate_head(step.rotary, row, dtype_, own + bytes(latent_dim));
        const int64_t last = step.cache[row].length - 1;
        std::memcpy(static_cast<char*>(step.cache[row].keys) + bytes(last * step.key_strides.position), own,
                    bytes(latent_dim));
        std::memcpy(static_cast<char*>(step.cache[row].values) + bytes(last * step.value_strides.position),
                    own + bytes(latent_dim), bytes(turned_dim));
        for (int64_t head = 0; head < heads; ++head) {
            char* to = turned + bytes((row * heads + head) * turned_dim);
            std::memcpy(to, queries + bytes((row * heads + head) * head_rows + plain_dim), bytes(turned_dim));
            rotate_head(step.rotary, row, dtype_, to);
        }
    }
    float *latents = scratch.take<float>(spaces), *attended = scratch.take<float>(spaces);
    float* plain = scratch.take<float>(rows * heads * plain_dim);
    absorb(queries, rows, latents, plain, step.threads);
    AttentionCall attention{latents, step.cache, step.key_strides, step.value_strides, dtype_, rows,        heads, 1,
                            latent_dim, latent_dim, scale,         attended,           step.threads};
    attention.turned = turned;
    attention.turned_dim = turned_dim;
    attend(attention);
    char* values = take(scratch, rows * heads * value_dim);
    expand(attended, rows, values, scratch, step.threads);
    linear({{output.matrix, output.bias, step.out}}, values, dtype_, rows, step.threads);
}

// The plain part of each head's queries, times the head's rows of key_up -> latents [rows, heads, latent_dim].
void LatentAttention::absorb(const char* queries, int64_t rows, float* latents, float* plain, int threads) const {
    const int64_t head_rows = plain_dim + turned_dim;
    parallel_for(heads, threads, [&](int64_t head, int) {
        const char* own = static_cast<const char*>(key_up) + bytes(head * plain_dim * latent_dim);
        for (int64_t row = 0; row < rows; ++row) {  // one by one: few rows, and bits that no other row changes
            float *weights = plain + (row * heads + head) * plain_dim, *out = latents + (row * heads + head) * latent_dim;
            load_floats(queries + bytes((row * heads + head) * head_rows), dtype_, plain_dim, weights);
            std::fill_n(out, latent_dim, 0.0f);
            tile_kernels().add_rows(weights, plain_dim, 1, own, dtype_, latent_dim, plain_dim, latent_dim, out);
        }
    });
}

int64_t LatentAttention::expand_bytes(int64_t rows, int threads) const {
    return rows_bytes(rows * heads, up.groups) + Scratch::bytes_of<TokenRow>(rows * heads) +
           threads * (Scratch::bytes_of<float>(kTileFloats) + Scratch::rounded(tile_kernels().scratch_bytes(up.groups)));
}

// What attention gave each head, [rows, heads, latent_dim], times the head's rows of values -> [rows, heads, value_dim].
void LatentAttention::expand(const float* latents, int64_t rows, void* values, Scratch& scratch, int threads) const {
    const TileKernels& kernels = tile_kernels();
    const TokenRows quantized = take_rows(scratch, rows * heads, up.groups);
    TokenRow* tokens = scratch.take<TokenRow>(rows * heads);  // by head, then row
    float* tiles = scratch.take<float>(threads * kTileFloats);
    const int64_t kernel_bytes = Scratch::rounded(kernels.scratch_bytes(up.groups));
    char* memory = scratch.take<char>(threads * kernel_bytes);
    parallel_for(heads, threads, [&](int64_t head, int thread) {
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t at = head * rows + row;
            quantize_row(latents + (row * heads + head) * latent_dim, latent_dim, quantized, at);
            tokens[at] = quantized.row(at);
        }
        float* tile = tiles + thread * kTileFloats;
        for (int first = 0; first < value_dim; first += kTileRows) {
            const int count = std::min(kTileRows, value_dim - first);
            const int from = static_cast<int>(head) * (plain_dim + value_dim) + plain_dim + first;
            kernels.multiply(up, from, count, tokens + head * rows, static_cast<int>(rows), tile,
                             memory + thread * kernel_bytes);
            for (int64_t row = 0; row < rows; ++row) {
                store_floats(tile + row * kTileRows, count, dtype_,
                             static_cast<char*>(values) + bytes((row * heads + head) * value_dim + first));
            }
        }
    });
}

}  // namespace fate
