// Python bindings. Tensors arrive as addresses (data_ptr): fate/kernels/__init__.py has checked shapes, dtypes and
// contiguity, and this file checks what could lead outside of them: a record's layout, ids, tokens and ranks.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "decode.h"
#include "gate.h"
#include "linear.h"
#include "ops.h"
#include "quantize.h"
#include "rows.h"
#include "tiles.h"
#include "transfer.h"

namespace nb = nanobind;
using namespace fate;

namespace {

template <typename T>
T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

void require(bool holds, const char* message) {
    if (!holds) throw nb::value_error(message);
}

// [at, at + size) within [0, end), for a size >= 0.
bool within(int64_t at, int64_t size, int64_t end) { return at >= 0 && size >= 0 && size <= end && at <= end - size; }

using Place = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;  // rows, cols, high, affine, low

Record make_record(bool int8, int64_t bytes, const std::vector<Place>& places) {
    require(places.size() <= 8, "a record holds at most 8 matrices");
    require(bytes >= 64, "a record starts with 64 bytes of constants");
    Record record{int8, bytes, static_cast<int>(places.size()), {}};
    for (size_t i = 0; i < places.size(); ++i) {
        const auto [rows, cols, high, affine, low] = places[i];
        require(rows > 0 && cols > 0 && rows < INT32_MAX && cols < INT32_MAX / 64, "a matrix has a bad shape");
        const int64_t groups = (cols + kGroup - 1) / kGroup;
        const int64_t plane = rows * groups * (int8 ? kGroup : kPlaneGroupBytes);
        // Behind the constants: kernels may read a few bytes before the scales.
        require(within(high, plane, bytes) && within(affine, rows * groups * 4, bytes) && affine >= 64 &&
                    affine % 2 == 0 && (int8 || within(low, plane, bytes)),
                "a section lies outside of its record");
        record.places[i] = {high, affine, low, static_cast<int>(rows), static_cast<int>(cols)};
    }
    return record;
}

Matrix matrix_of(const Record& record, int index, bool prefix_only, uint64_t packed) {
    require(index >= 0 && index < record.count, "the record has no matrix of this index");
    require(packed % alignof(float) == 0, "a record must be aligned to 4 bytes");
    return record.matrix(pointer<const uint8_t>(packed), index, prefix_only);
}

void bind_linear(const Record& record, int index, bool prefix_only, uint64_t packed, uint64_t x, int dtype,
                 int64_t tokens, uint64_t bias, uint64_t out, int threads) {
    const Matrix matrix = matrix_of(record, index, prefix_only, packed);
    nb::gil_scoped_release release;
    linear({{matrix, pointer<const void>(bias), pointer<void>(out)}}, pointer<const void>(x), static_cast<DType>(dtype),
           tokens, threads);
}

ExpertActivation make_activation(int kind, bool gated, bool interleaved, float alpha, float gate_max, float act_max,
                                 float up_limit, float up_offset) {
    require(kind >= 0 && kind <= static_cast<int>(ActivationKind::kSiluSoftcap), "no activation has this number");
    require(gated || static_cast<ActivationKind>(kind) != ActivationKind::kSiluSoftcap, "softcaps are of two halves");
    return {static_cast<ActivationKind>(kind), gated, interleaved, alpha, gate_max, act_max, up_limit, up_offset};
}

void require_expert(const Record& record, const ExpertActivation& activation) {
    require(record.count == 2 && record.places[0].rows == (activation.gated ? 2 : 1) * record.places[1].cols &&
                record.places[0].cols == record.places[1].rows,
            "an expert needs matrices [2I, H], or [I, H] where nothing gates, and [H, I]");
}

// Biases of both matrices [experts, rows], their dtype, how many experts, and which of these each of a call's is.
using Biases = std::tuple<uint64_t, uint64_t, int, int64_t, std::vector<int64_t>>;

void bind_experts(const Record& record, const ExpertActivation& activation, const std::optional<Biases>& biases,
                  uint64_t pool, int64_t pool_bytes, const std::vector<int64_t>& slot_offsets,
                  const std::vector<int>& precisions, const std::vector<int64_t>& pair_offsets, uint64_t pairs,
                  int64_t num_pairs, uint64_t x, int dtype, int64_t tokens, uint64_t rows, int64_t top_k,
                  int threads) {
    const size_t count = slot_offsets.size();
    require_expert(record, activation);
    require(precisions.size() == count && pair_offsets.size() == count + 1,
            "slot_offsets, precisions and pair_offsets must have E, E and E + 1 entries");
    require(pair_offsets.front() >= 0 && pair_offsets.back() <= num_pairs, "pair_offsets reach outside of pairs");
    const int32_t* pair = pointer<const int32_t>(pairs);
    for (int64_t p = pair_offsets.front(); p < pair_offsets.back(); ++p) {
        require(pair[2 * p] >= 0 && pair[2 * p] < tokens && pair[2 * p + 1] >= 0 && pair[2 * p + 1] < top_k,
                "a (token, rank) pair lies outside of rows");
    }
    ExpertsCall call{&record, pointer<const void>(x), static_cast<DType>(dtype), tokens, pair, pointer<float>(rows),
                     top_k, threads, activation};
    if (biases) {
        const auto& [up, down, bias_dtype, experts, numbers] = *biases;
        require(numbers.size() == count, "biases need the number of every expert");
        for (const int64_t number : numbers) require(within(number, 1, experts), "an expert has no biases");
        call.up_bias = pointer<const void>(up);
        call.down_bias = pointer<const void>(down);
        call.bias_dtype = static_cast<DType>(bias_dtype);
    }
    std::vector<ExpertWork> work(count);
    for (size_t e = 0; e < count; ++e) {
        const bool prefix_only = precisions[e] == 2;
        require(pair_offsets[e] <= pair_offsets[e + 1], "pair_offsets must not decrease");
        require(within(slot_offsets[e], record.bytes, pool_bytes) && slot_offsets[e] % 64 == 0,
                "a slot lies outside of the pool or is not 64-byte aligned");
        work[e] = {pointer<const uint8_t>(pool) + slot_offsets[e], prefix_only, pair_offsets[e],
                   pair_offsets[e + 1] - pair_offsets[e], biases ? std::get<4>(*biases)[e] : 0};
    }
    nb::gil_scoped_release release;
    experts(call, work.data(), static_cast<int>(count));
}

void bind_reduce_rows(uint64_t rows, uint64_t weights, int weights_dtype, int64_t tokens, int64_t top_k, int64_t hidden,
                      int out_dtype, uint64_t out, int threads) {
    nb::gil_scoped_release release;
    reduce_rows(pointer<const float>(rows), pointer<const void>(weights), static_cast<DType>(weights_dtype), tokens,
                top_k, hidden, static_cast<DType>(out_dtype), pointer<void>(out), threads);
}

void bind_gather_rows(const Record& record, int index, uint64_t packed, uint64_t ids, int64_t count, int dtype,
                      uint64_t out, int threads) {
    const Matrix matrix = matrix_of(record, index, false, packed);
    const int64_t* id = pointer<const int64_t>(ids);
    for (int64_t i = 0; i < count; ++i) {
        if (id[i] < 0 || id[i] >= matrix.rows) throw nb::index_error("a row id lies outside of the matrix");
    }
    nb::gil_scoped_release release;
    gather_rows(matrix, id, count, static_cast<DType>(dtype), pointer<void>(out), threads);
}

using Strides = std::tuple<int64_t, int64_t, int64_t>;  // batch, head, position

void bind_attend(uint64_t q, uint64_t keys, Strides key_strides, uint64_t values, Strides value_strides, int dtype,
                 std::tuple<int64_t, int64_t, int64_t, int64_t> shape, std::tuple<int, int> dims, float scale,
                 uint64_t out, int threads) {
    const auto [batch, heads, kv_heads, length] = shape;
    const auto [key_dim, value_dim] = dims;
    const auto [key_batch, key_head, key_position] = key_strides;
    const auto [value_batch, value_head, value_position] = value_strides;
    require(batch > 0 && kv_heads > 0 && heads % kv_heads == 0 && length > 0 && key_dim > 0 && value_dim > 0,
            "attention needs positions, dimensions, and heads that share key-value heads equally");
    const DType type = static_cast<DType>(dtype);
    std::vector<KVRow> rows(batch);
    for (int64_t row = 0; row < batch; ++row) {
        rows[row] = {element(pointer<void>(keys), type, row * key_batch),
                     element(pointer<void>(values), type, row * value_batch), 0, length};
    }
    const AttentionCall call{pointer<const void>(q), rows.data(), {key_head, key_position}, {value_head, value_position},
                             type, batch, heads, kv_heads, key_dim, value_dim, scale, pointer<void>(out), threads};
    nb::gil_scoped_release release;
    attend(call);
}

float bind_largest_magnitude(uint64_t weights, int dtype, int64_t pitch, int rows, int cols) {
    nb::gil_scoped_release release;
    return largest_magnitude(pointer<const void>(weights), static_cast<DType>(dtype), pitch, rows, cols);
}

std::tuple<double, double> bind_quantize_matrix(uint64_t weights, int dtype, int64_t pitch, int rows, int cols,
                                                float inverse_unit, int headroom,
                                                std::tuple<int, float, float, float> settings, uint64_t high,
                                                uint64_t affine, uint64_t low, int threads) {
    nb::gil_scoped_release release;
    const auto [iterations, p, beta, kappa] = settings;
    const SlopeSums sums =
        quantize_matrix(pointer<const void>(weights), static_cast<DType>(dtype), pitch, rows, cols, inverse_unit,
                        headroom, {iterations, p, beta, kappa},
                        {pointer<uint8_t>(high), pointer<uint16_t>(affine), pointer<uint8_t>(low)}, threads);
    return {sums.squares, sums.products};
}

int bind_read_file(int fd, uint64_t to, int64_t length, int64_t offset, int64_t chunk, uint64_t progress) {
    require(length >= 0 && offset >= 0 && chunk > 0, "a read needs a length, an offset and a chunk");
    nb::gil_scoped_release release;
    return read_file(fd, pointer<uint8_t>(to), length, offset, chunk, pointer<Progress>(progress));
}

void bind_copy_paced(uint64_t to, uint64_t from, int64_t length, int64_t chunk, double start_s, double bytes_per_s,
                     uint64_t progress) {
    require(length >= 0 && chunk > 0, "a copy needs a length and a chunk");
    nb::gil_scoped_release release;
    copy_paced(pointer<uint8_t>(to), pointer<const uint8_t>(from), length, chunk, start_s, bytes_per_s,
               pointer<Progress>(progress));
}

// Keeps the interpreter: giving it up for some microseconds would cost more than they are worth.
std::vector<Ranked> bind_rank_experts(uint64_t weights, uint64_t x, int dtype, int experts, int hidden, int64_t tokens,
                                      int limit, int threads) {
    require(experts > 0 && hidden > 0 && limit > 0 && tokens > 0, "a gate needs experts, a hidden size and a limit");
    return rank_experts(pointer<const void>(weights), pointer<const void>(x), static_cast<DType>(dtype), experts,
                        hidden, tokens, limit, threads);
}

Router router_of(uint64_t weight, int experts, int top_k, bool renormalize, int score_dtype) {
    require(top_k > 0 && top_k <= experts, "a router needs at least top_k experts");
    return {pointer<const void>(weight), experts, top_k, renormalize, static_cast<DType>(score_dtype)};
}

void bind_route_rows(const Router& router, uint64_t x, int dtype, int hidden, int64_t tokens, uint64_t logits,
                     uint64_t scores, uint64_t indices, int threads) {
    require(hidden > 0 && tokens > 0, "a router needs a hidden size and tokens");
    nb::gil_scoped_release release;
    route(router.weight, pointer<const void>(x), static_cast<DType>(dtype), router.experts, hidden, tokens,
          {pointer<void>(logits), pointer<void>(scores), router.score_dtype, pointer<int64_t>(indices), router.top_k,
           router.renormalize},
          threads);
}

void bind_multiply_few_rows(uint64_t weights, uint64_t x, int dtype, int rows, int cols, int64_t tokens, uint64_t out,
                            int threads) {
    require(rows > 0 && cols > 0, "a matrix needs rows and columns");
    nb::gil_scoped_release release;
    multiply_few_rows(pointer<const void>(weights), pointer<const void>(x), static_cast<DType>(dtype), rows, cols,
                      tokens, pointer<void>(out), threads);
}

void bind_add_gated(uint64_t experts, uint64_t shared, uint64_t logits, int dtype, int64_t tokens, int hidden,
                    uint64_t out, int threads) {
    nb::gil_scoped_release release;
    add_gated(pointer<const void>(experts), pointer<const void>(shared), pointer<const void>(logits),
              static_cast<DType>(dtype), tokens, hidden, pointer<void>(out), threads);
}

void bind_silu_times(uint64_t gate, uint64_t up, int dtype, int64_t count, int threads) {
    nb::gil_scoped_release release;
    silu_times(pointer<void>(gate), pointer<const void>(up), static_cast<DType>(dtype), count, threads);
}

using Packed = std::tuple<const Record*, uint64_t, uint64_t>;  // a record of one matrix, its address, its bias
using NormOf = std::tuple<uint64_t, int, float, bool>;          // see Norm

Matrix dense_matrix(const Packed& packed) { return matrix_of(*std::get<0>(packed), 0, false, std::get<1>(packed)); }

Linear linear_of(const Packed& packed) { return {dense_matrix(packed), pointer<const void>(std::get<2>(packed))}; }

Norm norm_of(const NormOf& norm) {
    const auto [weight, cols, eps, round_before_scale] = norm;
    return {pointer<const void>(weight), cols, eps, round_before_scale};
}

void bind_rms_norm(const NormOf& norm, uint64_t x, int dtype, int64_t rows, uint64_t out, int threads) {
    require(std::get<1>(norm) > 0, "a norm needs columns");
    nb::gil_scoped_release release;
    rms_norm(norm_of(norm), pointer<const void>(x), static_cast<DType>(dtype), rows, pointer<void>(out), threads);
}

void require_gated_mlp(const Matrix& gate, const Matrix& up, const Matrix& down) {
    require(gate.cols == up.cols && gate.rows == up.rows && down.cols == gate.rows,
            "a gated MLP needs matrices [I, H], [I, H] and [O, I]");
}

void bind_gated_mlp(const Packed& gate, const Packed& up, const Packed& down, uint64_t x, int dtype, int64_t tokens,
                    uint64_t out, int threads) {
    const Matrix first = dense_matrix(gate), second = dense_matrix(up), third = dense_matrix(down);
    require_gated_mlp(first, second, third);
    nb::gil_scoped_release release;
    gated_mlp(first, second, third, pointer<const void>(x), static_cast<DType>(dtype), tokens, pointer<void>(out),
              threads);
}

Buffers make_buffers(int64_t rows, int hidden, int top_k, int experts, int dtype,
                     const std::tuple<uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t>& held) {
    const auto [residual, normed, shared, logits, scores, indices, pair_rows] = held;
    require(rows > 0 && hidden > 0 && top_k > 0 && experts > 0, "buffers need rows, a hidden size and experts");
    return {rows, hidden, top_k, experts, static_cast<DType>(dtype), pointer<void>(residual), pointer<void>(normed),
            pointer<void>(shared), pointer<void>(logits), pointer<void>(scores), pointer<int64_t>(indices),
            pointer<float>(pair_rows)};
}

void require_rows(const Buffers& buffers, int64_t rows, int ranks, int experts) {
    require(rows > 0 && rows <= buffers.rows && ranks > 0 && ranks <= buffers.top_k && experts <= buffers.experts,
            "more rows, ranks or experts than the buffers hold");
}

using RoutedLists = std::tuple<std::vector<int>, std::vector<int>, std::vector<float>>;

RoutedLists lists(Routed routed) {
    return {std::move(routed.experts), std::move(routed.pairs), std::move(routed.weights)};
}

void take_input(Buffers& buffers, uint64_t x, int64_t rows) {
    std::memmove(buffers.normed, pointer<const void>(x), rows * buffers.hidden * item_bytes(buffers.dtype));
}

RoutedLists bind_route(const Router& router, Buffers& buffers, uint64_t x, int64_t rows, int threads) {
    require_rows(buffers, rows, router.top_k, router.experts);
    take_input(buffers, x, rows);
    return lists([&] {
        nb::gil_scoped_release release;
        return route_buffers(router, buffers, rows, threads);
    }());
}

// Keeps the interpreter, as above.
RoutedLists bind_group(Buffers& buffers, uint64_t x, int64_t rows, int ranks, int experts, uint64_t indices,
                       uint64_t weights, int weights_dtype) {
    require_rows(buffers, rows, ranks, experts);
    take_input(buffers, x, rows);
    return lists(group(buffers, rows, ranks, experts, pointer<const int64_t>(indices), pointer<const void>(weights),
                       static_cast<DType>(weights_dtype)));
}

AttentionHalf make_attention_half(const std::tuple<NormOf, NormOf>& norms,
                                  const std::tuple<Packed, Packed, Packed, Packed>& matrices,
                                  const std::tuple<NormOf, NormOf>& head_norms, int head_dim, float scale, int dtype) {
    const auto& [query, key, value, output] = matrices;
    const AttentionHalf half{norm_of(std::get<0>(norms)), norm_of(std::get<1>(norms)), linear_of(query),
                             linear_of(key), linear_of(value), linear_of(output), norm_of(std::get<0>(head_norms)),
                             norm_of(std::get<1>(head_norms)), head_dim, scale, static_cast<DType>(dtype)};
    const int hidden = half.query.matrix.cols;
    const auto whole = [&](const Linear& linear) { return linear.matrix.rows % head_dim == 0; };
    const auto covers = [&](const Norm& norm, const Linear& linear) {
        return norm.weight == nullptr || (norm.cols > 0 && linear.matrix.rows % norm.cols == 0);
    };
    require(head_dim > 0 && whole(half.query) && whole(half.key) && whole(half.value), "matrices must be whole heads");
    require(covers(half.query_norm, half.query) && covers(half.key_norm, half.key), "a norm must cover heads");
    require(half.key.matrix.cols == hidden && half.value.matrix.cols == hidden, "q, k and v must have one input");
    require(half.input_norm.cols == hidden && half.post_norm.cols == hidden && half.output.matrix.rows == hidden &&
                half.output.matrix.cols == half.query.matrix.rows && half.key.matrix.rows == half.value.matrix.rows &&
                half.heads() % half.kv_heads() == 0,
            "norms, matrices and heads must fit one another");
    return half;
}

// Where each row's keys and values are, the first position it attends to, and how many there are with the new one.
using Places = std::vector<std::tuple<uint64_t, uint64_t, int64_t, int64_t>>;

std::optional<RoutedLists> bind_attend_half(const AttentionHalf& half, Buffers& buffers, const Router* router,
                                            uint64_t x, const std::tuple<uint64_t, uint64_t, int, int>& rotary,
                                            const Places& places, std::tuple<int64_t, int64_t> key_strides,
                                            std::tuple<int64_t, int64_t> value_strides, int threads) {
    const int64_t rows = static_cast<int64_t>(places.size());
    const auto [cos, sin, dim, step] = rotary;
    require_rows(buffers, rows, router == nullptr ? 1 : router->top_k, router == nullptr ? 1 : router->experts);
    require(buffers.hidden == half.query.matrix.cols && buffers.dtype == half.dtype, "these are another model's buffers");
    require(dim >= 0 && dim <= half.head_dim && dim % 2 == 0, "a rotation needs an even part of a head");
    std::vector<KVRow> kv;
    for (const auto& [keys, values, start, length] : places) {
        require(start >= 0 && start < length, "a row attends to its own token at least");
        kv.push_back({pointer<void>(keys), pointer<void>(values), start, length});
    }
    std::optional<Routed> routed;
    {
        nb::gil_scoped_release release;
        attend_half(half, buffers, pointer<const void>(x), rows,
                    {pointer<const void>(cos), pointer<const void>(sin), dim, step}, kv.data(),
                    std::make_from_tuple<CacheStrides>(key_strides), std::make_from_tuple<CacheStrides>(value_strides),
                    threads);
        if (router != nullptr) routed = route_buffers(*router, buffers, rows, threads);
    }
    if (!routed) return std::nullopt;
    return lists(std::move(*routed));
}

// Biases of both matrices [experts, rows], their dtype, how many experts; the shared expert and its gate's address.
using HalfBiases = std::tuple<uint64_t, uint64_t, int, int64_t>;
using Shared = std::tuple<Packed, Packed, Packed, uint64_t>;

ExpertHalf make_expert_half(const Record& record, const ExpertActivation& activation,
                            const std::optional<HalfBiases>& biases, const std::optional<Shared>& shared,
                            uint64_t pool, int64_t pool_bytes, int64_t slot_bytes, int dtype) {
    require_expert(record, activation);
    require(slot_bytes >= record.bytes && slot_bytes % 64 == 0 && pool % 64 == 0 && pool_bytes >= 0,
            "slots must hold a record each, aligned to 64 bytes");
    ExpertHalf half{};
    half.record = record;
    half.activation = activation;
    half.pool = pointer<const uint8_t>(pool);
    half.slot_bytes = slot_bytes;
    half.num_slots = pool_bytes / slot_bytes;
    half.hidden = record.places[0].cols;
    half.dtype = static_cast<DType>(dtype);
    if (biases) {
        const auto [up, down, bias_dtype, experts] = *biases;
        half.up_bias = pointer<const void>(up);
        half.down_bias = pointer<const void>(down);
        half.bias_dtype = static_cast<DType>(bias_dtype);
        half.bias_experts = experts;
    }
    if (shared) {
        const auto& [gate, up, down, share] = *shared;
        half.has_shared = true;
        half.shared = {dense_matrix(gate), dense_matrix(up), dense_matrix(down), pointer<const void>(share)};
        require_gated_mlp(half.shared.gate, half.shared.up, half.shared.down);
        require(half.shared.gate.cols == half.hidden && half.shared.down.rows == half.hidden,
                "the shared expert must take what the experts take");
    }
    return half;
}

void bind_run_experts(const ExpertHalf& half, Buffers& buffers, int64_t rows, const std::vector<int>& experts,
                      const std::vector<int64_t>& slots, const std::vector<int>& precisions, bool first, bool last,
                      bool add_residual, uint64_t out, int threads) {
    require_rows(buffers, rows, buffers.ranks, 1);
    require(buffers.hidden == half.hidden && buffers.dtype == half.dtype, "these are another model's buffers");
    require(static_cast<int64_t>(buffers.weights.size()) >= rows * buffers.ranks, "nothing is routed");
    require(slots.size() == experts.size() && (precisions.empty() || precisions.size() == experts.size()),
            "experts and slots must be as many");
    std::vector<Resident> residents;
    for (size_t e = 0; e < experts.size(); ++e) {
        require(experts[e] >= 0 && experts[e] + 1 < static_cast<int64_t>(buffers.first.size()), "no such expert");
        require(within(slots[e], 1, half.num_slots), "a slot lies outside of the pool");
        require(half.up_bias == nullptr || experts[e] < half.bias_experts, "an expert has no biases");
        residents.push_back({experts[e], slots[e], !precisions.empty() && precisions[e] == 2});
    }
    nb::gil_scoped_release release;
    run_experts(half, buffers, rows, residents, first, last, add_residual, pointer<void>(out), threads);
}

}  // namespace

NB_MODULE(_cpu, m) {
    nb::set_leak_warnings(false);  // a model may live until the interpreter has gone
    nb::class_<Record>(m, "Record").def_static("make", &make_record);
    nb::class_<ExpertActivation>(m, "ExpertActivation").def_static("make", &make_activation);
    m.def("linear", &bind_linear);
    m.def("experts", &bind_experts);
    m.def("reduce_rows", &bind_reduce_rows);
    m.def("gather_rows", &bind_gather_rows);
    m.def("attend", &bind_attend);
    m.def("rms_norm", &bind_rms_norm);
    m.def("multiply_few_rows", &bind_multiply_few_rows);
    m.def("add_gated", &bind_add_gated);
    m.def("silu_times", &bind_silu_times);
    m.def("gated_mlp", &bind_gated_mlp);
    m.def("route_rows", &bind_route_rows);
    m.def("route", &bind_route);
    m.def("group", &bind_group);
    nb::class_<Router>(m, "Router").def_static("make", &router_of);
    nb::class_<Buffers>(m, "Buffers").def_static("make", &make_buffers);
    nb::class_<AttentionHalf>(m, "AttentionHalf")
        .def_static("make", &make_attention_half)
        .def("run", &bind_attend_half, nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg());
    nb::class_<ExpertHalf>(m, "ExpertHalf").def_static("make", &make_expert_half).def("run", &bind_run_experts);
    m.def("largest_magnitude", &bind_largest_magnitude);
    m.def("quantize_matrix", &bind_quantize_matrix);
    m.def("read_file", &bind_read_file);
    m.def("copy_paced", &bind_copy_paced);
    m.def("rank_experts", &bind_rank_experts);
    m.def("kernel_name", [] { return std::string(tile_kernels().name); });
    m.def("available_kernels", [] {
        std::vector<std::string> names;
        for (const TileKernels* kernels : available_tile_kernels()) names.emplace_back(kernels->name);
        return names;
    });
    m.def("select_kernels", [](const std::string& name) { return select_tile_kernels(name.c_str()); });
}
