#include "decode.h"
#include "linear.h"
#include "scratch.h"

namespace fate {

int64_t attention_half_scratch_bytes(int64_t hidden, int64_t query_rows, int64_t key_rows, DType dtype, int64_t rows) {
    const int64_t each = rows * item_bytes(dtype);
    return Scratch::rounded(each * hidden) + 2 * Scratch::rounded(each * query_rows) +
           2 * Scratch::rounded(each * key_rows);
}

void attention_half(const AttentionHalf& half, const AttentionStep& step) {
    const int64_t item = item_bytes(half.dtype), count = step.rows * half.hidden();
    const int64_t hidden = count * item, queries = step.rows * half.query.matrix.rows * item;
    const int64_t keys = step.rows * half.key.matrix.rows * item;
    Scratch& scratch = Scratch::reserve(attention_half_scratch_bytes(half.hidden(), half.query.matrix.rows,
                                                                     half.key.matrix.rows, half.dtype, step.rows),
                                        Scratch::kCaller);
    void *normed = scratch.take<char>(hidden), *heads = scratch.take<char>(queries);
    HeadsCall call{half.query, half.key,       half.value,   step.rotary, normed,           half.dtype,
                   step.rows,  half.head_dim, step.threads, step.cache,  step.key_strides, step.value_strides};
    call.query.out = scratch.take<char>(queries);
    call.key.out = scratch.take<char>(keys);
    call.value.out = scratch.take<char>(keys);
    rms_norm(half.input_norm, step.x, half.dtype, step.rows, normed, step.threads);
    project_heads(call);
    attend({call.query.out, step.cache, step.key_strides, step.value_strides, half.dtype, step.rows, half.heads(),
            half.kv_heads(), half.head_dim, half.head_dim, half.scale, heads, step.threads});
    linear({{half.output.matrix, half.output.bias, normed}}, heads, half.dtype, step.rows, step.threads);
    add_values(step.x, normed, half.dtype, count, step.residual);
    rms_norm(half.post_norm, step.residual, half.dtype, step.rows, step.normed, step.threads);
}

}  // namespace fate
