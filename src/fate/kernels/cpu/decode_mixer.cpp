#include "activations.h"
#include "decode.h"
#include "scratch.h"

namespace fate {

void MixerHalf::run(MixerStep step, void* residual, void* normed) const {
    const DType dtype = mixer->dtype();
    const int64_t count = step.rows * mixer->hidden(), bytes = count * item_bytes(dtype);
    Scratch& scratch =
        Scratch::reserve(2 * Scratch::rounded(bytes) + mixer->scratch_bytes(step.rows, step.threads), Scratch::kCaller);
    void *before = scratch.take<char>(bytes), *after = scratch.take<char>(bytes);
    const void* x = step.x;
    rms_norm(input_norm, x, dtype, step.rows, before, step.threads);
    step.x = before;
    step.out = after;
    mixer->run(step, scratch);
    add_values(x, after, dtype, count, residual);
    rms_norm(post_norm, residual, dtype, step.rows, normed, step.threads);
}

int64_t most_mixer_scratch_bytes(int64_t hidden, int64_t widest, int64_t rows, int threads) {
    constexpr int64_t kParts = 8, kThreadBytes = 1 << 16;
    const int64_t groups = widest / kGroup + 1;
    return 2 * Scratch::rounded(rows * hidden * 4) + kParts * Scratch::rounded(rows * widest * 4) +
           TokenRows::bytes(rows, static_cast<int>(groups)) + threads * kThreadBytes;
}

}  // namespace fate
