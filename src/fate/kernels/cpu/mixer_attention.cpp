#include "linear.h"
#include "mixer.h"

namespace fate {

int64_t Attention::scratch_bytes(int64_t rows, int) const {
    const int64_t queries = taken(rows * query_rows()), keys = taken(rows * key.matrix.rows);
    return 2 * queries + 2 * keys + (gated ? queries + taken(rows * query.matrix.rows) : 0);
}

void Attention::run(const MixerStep& step, Scratch& scratch) const {
    const int64_t queries = step.rows * query_rows(), keys = step.rows * key.matrix.rows;
    HeadsCall call{query,     key,      value,        step.rotary, step.x,           dtype_,
                   step.rows, head_dim, step.threads, step.cache,  step.key_strides, step.value_strides};
    call.query.out = take(scratch, queries);
    call.key.out = take(scratch, keys);
    call.value.out = take(scratch, keys);
    if (gated) {
        call.joined = take(scratch, step.rows * query.matrix.rows);
        call.gates = take(scratch, queries);
    }
    void* attended = take(scratch, queries);
    project_heads(call);
    AttentionCall attention{call.query.out, step.cache, step.key_strides, step.value_strides, dtype_, step.rows,
                            heads(),        kv_heads(), head_dim,         head_dim,           scale,  attended,
                            step.threads};
    attention.sinks = sinks;
    attend(attention);
    if (gated) multiply_by_gates(attended, call.gates, dtype_, queries);
    linear({{output.matrix, output.bias, step.out}}, attended, dtype_, step.rows, step.threads);
}

}  // namespace fate
