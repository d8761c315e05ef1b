// Python bindings. Tensors arrive as addresses (data_ptr): fate/kernels/__init__.py has checked shapes, dtypes and
// contiguity, and this file checks what could lead outside of them: a record's layout, ids, tokens and ranks.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "binding.h"
#include "ops.h"
#include "gate.h"
#include "linear.h"
#include "quantize.h"
#include "rows.h"
#include "tiles.h"
#include "transfer.h"

namespace nb = nanobind;
using namespace fate;

namespace {

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

// Rows of one tensor of keys and one of values, all of the same length.
std::vector<CacheRow> cache_rows(uint64_t keys, Strides key_strides, uint64_t values, Strides value_strides, int dtype,
                                 int64_t batch, int64_t length) {
    const int64_t item = item_bytes(static_cast<DType>(dtype));
    std::vector<CacheRow> rows(batch);
    for (int64_t row = 0; row < batch; ++row) {
        rows[row] = {pointer<char>(keys) + row * std::get<0>(key_strides) * item,
                     pointer<char>(values) + row * std::get<0>(value_strides) * item, length};
    }
    return rows;
}

// Calls body(call) with a call over caches that share a tensor; the call's `out` and threads are the body's to set.
template <typename Body>
void with_attention(uint64_t q, uint64_t keys, Strides key_strides, uint64_t values, Strides value_strides, int dtype,
                    std::tuple<int64_t, int64_t, int64_t, int64_t> shape, std::tuple<int, int> dims, float scale,
                    const Body& body) {
    const auto [batch, heads, kv_heads, length] = shape;
    const auto [key_dim, value_dim] = dims;
    require(batch > 0 && kv_heads > 0 && heads % kv_heads == 0 && length > 0 && key_dim > 0 && value_dim > 0,
            "attention needs positions, dimensions, and heads that share key-value heads equally");
    const std::vector<CacheRow> rows = cache_rows(keys, key_strides, values, value_strides, dtype, batch, length);
    const auto [kb, key_head, key_position] = key_strides;
    const auto [vb, value_head, value_position] = value_strides;
    body(AttentionCall{pointer<const void>(q), rows.data(), {key_head, key_position}, {value_head, value_position},
                       static_cast<DType>(dtype), batch, heads, kv_heads, key_dim, value_dim, scale, nullptr, 1});
}

void bind_attend(uint64_t q, uint64_t keys, Strides key_strides, uint64_t values, Strides value_strides, int dtype,
                 std::tuple<int64_t, int64_t, int64_t, int64_t> shape, std::tuple<int, int> dims, float scale,
                 uint64_t sinks, uint64_t out, int threads) {
    with_attention(q, keys, key_strides, values, value_strides, dtype, shape, dims, scale, [&](AttentionCall call) {
        call.sinks = pointer<const float>(sinks);
        call.out = pointer<void>(out);
        call.threads = threads;
        nb::gil_scoped_release release;
        attend(call);
    });
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
    m.def("largest_magnitude", &bind_largest_magnitude);
    m.def("quantize_matrix", &bind_quantize_matrix);
    m.def("read_file", &bind_read_file);
    m.def("copy_paced", &bind_copy_paced);
    bind_decode(m);
    m.def("kernel_name", [] { return std::string(tile_kernels().name); });
    m.def("available_kernels", [] {
        std::vector<std::string> names;
        for (const TileKernels* kernels : available_tile_kernels()) names.emplace_back(kernels->name);
        return names;
    });
    m.def("select_kernels", [](const std::string& name) { return select_tile_kernels(name.c_str()); });
}
