// What the files that bind kernels to Python share.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "decode.h"
#include "expert_activation.h"
#include "layout.h"

namespace fate {

template <typename T>
T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

inline void require(bool holds, const char* message) {
    if (!holds) throw nanobind::value_error(message);
}

// [at, at + size) within [0, end), for a size >= 0.
inline bool within(int64_t at, int64_t size, int64_t end) {
    return at >= 0 && size >= 0 && size <= end && at <= end - size;
}

inline Matrix matrix_of(const Record& record, int index, bool prefix_only, uint64_t packed) {
    require(index >= 0 && index < record.count, "the record has no matrix of this index");
    require(packed % alignof(float) == 0, "a record must be aligned to 4 bytes");
    return record.matrix(pointer<const uint8_t>(packed), index, prefix_only);
}

inline void require_expert(const Record& record, const ExpertActivation& activation) {
    require(record.count == 2 && record.places[0].rows == (activation.gated ? 2 : 1) * record.places[1].cols &&
                record.places[0].cols == record.places[1].rows,
            "an expert needs matrices [2I, H], or [I, H] where nothing gates, and [H, I]");
}

inline void require_gated_mlp(const Matrix& gate, const Matrix& up, const Matrix& down) {
    require(gate.cols == up.cols && gate.rows == up.rows && down.cols == gate.rows,
            "a gated MLP needs matrices [I, H], [I, H] and [O, I]");
}

inline void require_shared_expert(const SharedExpert& shared, int hidden) {
    require_gated_mlp(shared.gate.matrix, shared.up.matrix, shared.down.matrix);
    require(shared.gate.matrix.cols == hidden && shared.down.matrix.rows == hidden, "the shared expert must fit");
}

inline void require_norm_of_heads(const Projection& to) {
    require(to.norm.weight == nullptr || (to.norm.cols > 0 && to.matrix.rows % to.norm.cols == 0),
            "a norm must cover heads");
}

inline void require_heads(const Projection& query, const Projection& key, const Projection& value, int head_dim) {
    const auto whole = [&](const Projection& to) { return to.matrix.rows % head_dim == 0; };
    require(head_dim > 0 && whole(query) && whole(key) && whole(value), "matrices must be whole heads");
    require(query.matrix.cols == key.matrix.cols && key.matrix.cols == value.matrix.cols,
            "queries, keys and values must have one input");
}

// The decode objects: Norm, PackedMatrix, Router, SharedExpert, Buffers, mixers, MixerHalf, ExpertHalf.
void bind_decode(nanobind::module_& m);

}  // namespace fate
