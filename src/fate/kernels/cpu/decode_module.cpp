// Python bindings of decode.h, and of the operations on rows that a module path joins. Objects are built once, of
// addresses (data_ptr) of tensors that the facade, fate/kernels/decode.py, has checked and keeps alive; calls check what
// could lead outside of them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "binding.h"
#include "decode.h"
#include "ops.h"
#include "gate.h"
#include "linear.h"
#include "scratch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fate {

namespace {

constexpr int64_t kMaxRows = 16;

using RoutedLists = std::tuple<std::vector<int>, std::vector<int>, std::vector<double>>;

RoutedLists lists(Routed routed) {
    return {std::move(routed.experts), std::move(routed.pairs), std::move(routed.weights)};
}

// How a router chooses: scoring, logits in float32, bias, correction, groups, top_groups, group_best, scaling.
using ChoiceOf = std::tuple<int, bool, uint64_t, uint64_t, int, int, int, float>;

Router make_router(uint64_t weights, int experts, int hidden, int top_k, bool renormalize, int score_dtype,
                   const ChoiceOf& how) {
    const auto [scoring, float_logits, bias, correction, groups, top_groups, group_best, scaling] = how;
    require(hidden > 0 && top_k > 0 && top_k <= experts, "a router needs a hidden size and at least top_k experts");
    require(groups > 0 && experts % groups == 0 && top_groups > 0 && top_groups <= groups && group_best > 0 &&
                top_k <= experts / groups * top_groups,
            "groups must divide the experts, and hold top_k of them");
    return {pointer<const void>(weights),
            experts,
            hidden,
            top_k,
            renormalize,
            static_cast<DType>(score_dtype),
            static_cast<Scoring>(scoring),
            float_logits,
            pointer<const void>(bias),
            pointer<const float>(correction),
            groups,
            top_groups,
            group_best,
            scaling};
}

SharedExpert make_shared_expert(const Dense& gate, const Dense& up, const Dense& down, uint64_t share) {
    return {gate, up, down, pointer<const void>(share)};
}

void make_buffers(DecodeBuffers* at, int64_t rows, int hidden, int64_t top_k, int64_t num_experts, int dtype,
                  uint64_t residual, uint64_t normed, uint64_t logits, uint64_t scores, uint64_t indices) {
    require(rows > 0 && rows <= kMaxRows && hidden > 0 && top_k > 0 && top_k <= num_experts,
            "buffers need 1 to 16 rows, a hidden size and at least top_k experts");
    new (at) DecodeBuffers(rows, hidden, top_k, num_experts, static_cast<DType>(dtype),
                           {pointer<void>(residual), pointer<void>(normed), pointer<void>(logits),
                            pointer<void>(scores), pointer<int64_t>(indices)});
}

RoutedLists route_rows_of(DecodeBuffers& buffers, const Router& router, uint64_t x, int64_t rows, int threads) {
    return lists([&] {
        nb::gil_scoped_release release;
        buffers.set_normed(pointer<const void>(x), rows);
        return buffers.route(router, rows, threads);
    }());
}

RoutedLists choose(DecodeBuffers& buffers, uint64_t x, int64_t rows, uint64_t indices, uint64_t weights,
                   int weights_dtype, int64_t top_k, int64_t num_experts) {
    buffers.set_normed(pointer<const void>(x), rows);
    return lists(buffers.choose(pointer<const int64_t>(indices), pointer<const void>(weights),
                                static_cast<DType>(weights_dtype), rows, top_k, num_experts));
}

MixerHalf make_mixer_half(const Norm& input_norm, const Norm& post_norm, const Mixer& mixer) {
    require(input_norm.cols == mixer.hidden() && post_norm.cols == mixer.hidden(), "norms must be of the hidden size");
    return {input_norm, post_norm, &mixer};
}

using Pair = std::pair<int64_t, int64_t>;
// Addresses of each row's keys and values, strides of a head and of a position, first positions and lengths.
using KVRows = std::tuple<std::vector<uint64_t>, std::vector<uint64_t>, Pair, Pair, std::vector<int64_t>,
                          std::vector<int64_t>>;

// `to` [rows]: where each row's cache begins to be read.
void place_rows(const KVRows& kv, int64_t rows, int64_t item, CacheRow* to) {
    const auto& [keys, values, key_strides, value_strides, starts, lengths] = kv;
    for (const size_t size : {keys.size(), values.size(), starts.size(), lengths.size()})
        require(static_cast<int64_t>(size) == rows, "keys, values, starts and lengths need an entry for each row");
    for (int64_t row = 0; row < rows; ++row) {
        require(keys[row] != 0 && values[row] != 0 && starts[row] >= 0 && starts[row] < lengths[row],
                "a row must have a cache, and start before its length");
        to[row] = {pointer<char>(keys[row]) + starts[row] * key_strides.second * item,
                   pointer<char>(values[row]) + starts[row] * value_strides.second * item,
                   lengths[row] - starts[row]};
    }
}

// Addresses of each row's last inputs of the convolution and of its state.
using StateRows = std::vector<std::pair<uint64_t, uint64_t>>;

// cos, sin, how many elements of a head are rotated, angles between one row's and the next (0: one for all), how.
using RotaryOf = std::tuple<uint64_t, uint64_t, int, int, int>;

nb::object run_mixer_half(const MixerHalf& half, DecodeBuffers& buffers, const Router* router, uint64_t x, int64_t rows,
                          const std::optional<RotaryOf>& rotary, const std::optional<KVRows>& kv,
                          const std::optional<StateRows>& states, int threads) {
    const Mixer& mixer = *half.mixer;
    buffers.require_rows(rows);
    require(buffers.hidden() == mixer.hidden() && buffers.dtype() == mixer.dtype(),
            "these buffers are of another hidden size or dtype");
    require(router == nullptr || router->hidden == mixer.hidden(), "the router must take what the mixer gives");
    require(rotary.has_value() == (mixer.rotated() > 0) && states.has_value() == mixer.is_recurrent() &&
                kv.has_value() != mixer.is_recurrent(),
            "attention needs angles and a cache, a recurrence states");
    CacheRow cache[kMaxRows];
    StateRow state[kMaxRows];
    MixerStep step{};
    step.x = pointer<const void>(x);
    step.rows = rows;
    step.threads = threads;
    if (rotary) {
        const auto [cos, sin, dim, each, kind] = *rotary;
        require(dim >= 0 && dim <= mixer.rotated() && dim % 2 == 0 && dim <= 1024, "a rotation needs an even part of a head");
        step.rotary = {pointer<const void>(cos), pointer<const void>(sin), dim, each, static_cast<Rotation>(kind)};
    }
    if (kv) {
        place_rows(*kv, rows, item_bytes(mixer.dtype()), cache);
        const Pair &key_strides = std::get<2>(*kv), &value_strides = std::get<3>(*kv);
        step.cache = cache;
        step.key_strides = {key_strides.first, key_strides.second};
        step.value_strides = {value_strides.first, value_strides.second};
    }
    if (states) {
        require(static_cast<int64_t>(states->size()) == rows, "states need an entry for each row");
        for (int64_t row = 0; row < rows; ++row) {
            const auto [conv, own] = (*states)[row];
            require(conv != 0 && own != 0, "a row must have a state");
            state[row] = {pointer<void>(conv), pointer<float>(own)};
        }
        step.states = state;
    }
    Routed routed;
    {
        nb::gil_scoped_release release;
        half.run(step, buffers.residual(), buffers.normed());
        if (router != nullptr) routed = buffers.route(*router, rows, threads);
    }
    if (router == nullptr) return nb::none();
    return nb::cast(lists(std::move(routed)));
}

// x [sequences * tokens, hidden] -> out.
void run_delta_rule(const DeltaRule& rule, uint64_t x, int64_t tokens, const StateRows& states, uint64_t out,
                    int threads) {
    require(tokens > 0 && !states.empty(), "a sequence needs tokens");
    std::vector<StateRow> rows;
    for (const auto& [conv, own] : states) {
        require(conv != 0 && own != 0, "a sequence must have a state");
        rows.push_back({pointer<void>(conv), pointer<float>(own)});
    }
    MixerStep step{};
    step.x = pointer<const void>(x);
    step.rows = tokens * static_cast<int64_t>(rows.size());
    step.tokens = tokens;
    step.states = rows.data();
    step.out = pointer<void>(out);
    step.threads = threads;
    nb::gil_scoped_release release;
    rule.run(step, Scratch::reserve(rule.scratch_bytes(step.rows, threads), Scratch::kCaller));
}

Attention* make_attention(const Dense& query, const Dense& key, const Dense& value, const Dense& output,
                          const Norm& query_norm, const Norm& key_norm, int head_dim, float scale, bool gated,
                          uint64_t sinks, int dtype) {
    const Projection to_query{query.matrix, query.bias, query_norm, nullptr};
    const Projection to_key{key.matrix, key.bias, key_norm, nullptr}, to_value{value.matrix, value.bias, {}, nullptr};
    require_heads(to_query, to_key, to_value, head_dim);
    require_norm_of_heads(to_query);
    require_norm_of_heads(to_key);
    require(!gated || query.matrix.rows % (2 * head_dim) == 0, "each head's queries need a gate");
    require(!gated || query_norm.weight == nullptr || query_norm.cols == head_dim, "norms beside gates cover a head");
    auto* made = new Attention(to_query, to_key, to_value, output, head_dim, scale, gated, pointer<const float>(sinks),
                               static_cast<DType>(dtype));
    const bool fits = output.matrix.rows == made->hidden() && output.matrix.cols == made->query_rows() &&
                      value.matrix.rows == key.matrix.rows && made->heads() % made->kv_heads() == 0;
    if (!fits) delete made;
    require(fits, "matrices and heads must fit one another");
    return made;
}

// Heads, and dimensions of plain and turned queries, of values and of the latent space.
using LatentShape = std::tuple<int, int, int, int, int>;

void fill_latent(LatentAttention& to, const Dense* query_down, const Norm& query_norm, const Dense& query,
                 const Dense& latent, const Norm& latent_norm, uint64_t key_up, const Dense& up, const Dense& output,
                 const LatentShape& shape, float scale) {
    const auto [heads, plain, turned, value, space] = shape;
    require(heads > 0 && plain > 0 && turned > 0 && turned % 2 == 0 && value > 0 && space > 0, "sizes must be positive");
    const int before = query_down == nullptr ? to.hidden() : query_down->matrix.rows;
    require(query.matrix.cols == before && (query_down == nullptr || query_down->matrix.cols == to.hidden()) &&
                (query_down == nullptr || query_norm.cols == before) && query.matrix.rows == heads * (plain + turned) &&
                latent.matrix.cols == to.hidden() && latent.matrix.rows == space + turned && latent_norm.cols == space &&
                up.matrix.cols == space && up.matrix.rows == heads * (plain + value) && up.bias == nullptr &&
                output.matrix.cols == heads * value && output.matrix.rows == to.hidden(),
            "matrices and heads must fit one another");
    if (query_down != nullptr) to.query_down = *query_down;
    to.query_norm = query_norm;
    to.query = query;
    to.latent = latent;
    to.latent_norm = latent_norm;
    to.key_up = pointer<const void>(key_up);
    to.up = up.matrix;
    to.output = output;
    to.heads = heads;
    to.plain_dim = plain;
    to.turned_dim = turned;
    to.value_dim = value;
    to.latent_dim = space;
    to.scale = scale;
}

// A packed matrix, or the address of one of the activations' dtype and its rows.
using InputOf = std::tuple<std::optional<Dense>, uint64_t, int>;

Input input_of(const InputOf& given, int rows, int hidden) {
    const auto& [packed, plain, plain_rows] = given;
    const int own = packed ? packed->matrix.rows : plain_rows;
    require(own == rows && (packed ? packed->matrix.cols == hidden : plain != 0),
            "an input matrix must be [rows, hidden]");
    return {packed ? *packed : Dense{}, pointer<const void>(packed ? 0 : plain), rows};
}

// Heads of keys and values, their dimensions, and inputs that the convolution sees.
using DeltaShape = std::tuple<int, int, int, int, int>;

void fill_delta(DeltaRule& to, const std::vector<InputOf>& inputs, uint64_t conv, uint64_t conv_bias, uint64_t decay,
                uint64_t dt_bias, const Norm& norm, const Dense& output, const DeltaShape& shape) {
    const auto [key_heads, value_heads, key_dim, value_dim, kernel] = shape;
    require(key_heads > 0 && value_heads > 0 && value_heads % key_heads == 0 && key_dim > 0 && value_dim > 0 &&
                kernel > 0 && (inputs.size() == 2 || inputs.size() == 4),
            "sizes must be positive, and heads of keys divide those of values");
    to.key_heads = key_heads;
    to.value_heads = value_heads;
    to.key_dim = key_dim;
    to.value_dim = value_dim;
    to.kernel = kernel;
    to.joined = inputs.size() == 2;
    const int hidden = to.hidden();
    if (to.joined) {
        to.qkv = input_of(inputs[0], to.channels() + to.values(), hidden);
        to.b = input_of(inputs[1], 2 * value_heads, hidden);
    } else {
        to.qkv = input_of(inputs[0], to.channels(), hidden);
        to.z = input_of(inputs[1], to.values(), hidden);
        to.b = input_of(inputs[2], value_heads, hidden);
        to.a = input_of(inputs[3], value_heads, hidden);
    }
    require(norm.cols == value_dim && output.matrix.cols == to.values() && output.matrix.rows == hidden,
            "norm and output must fit the values");
    to.conv = pointer<const void>(conv);
    to.conv_bias = pointer<const void>(conv_bias);
    to.decay = pointer<const float>(decay);
    to.dt_bias = pointer<const float>(dt_bias);
    to.norm = norm;
    to.output = output;
}

// The biases of both matrices, their dtype, and of how many experts they are.
using BiasesOf = std::tuple<uint64_t, uint64_t, int, int64_t>;

ExpertHalf make_expert_half(const Record& record, const ExpertActivation& activation, const BiasesOf& biases,
                            const SharedExpert* shared, uint64_t pool, int64_t pool_bytes, int64_t slot_bytes,
                            int hidden, int dtype) {
    const auto [up, down, bias_dtype, biased] = biases;
    require_expert(record, activation);
    require(record.places[0].cols == hidden, "experts must take rows of the hidden size");
    require(slot_bytes >= record.bytes && slot_bytes % 64 == 0 && pool % 64 == 0 && pool_bytes >= 0,
            "slots must hold a record each, aligned to 64 bytes");
    if (shared != nullptr) require_shared_expert(*shared, hidden);
    return {record,
            activation,
            pointer<const void>(up),
            pointer<const void>(down),
            static_cast<DType>(bias_dtype),
            biased,
            shared != nullptr,
            shared != nullptr ? *shared : SharedExpert{},
            pointer<const uint8_t>(pool),
            slot_bytes,
            pool_bytes / slot_bytes,
            hidden,
            static_cast<DType>(dtype)};
}

void run_expert_half(const ExpertHalf& half, DecodeBuffers& buffers, int64_t rows, const std::vector<int64_t>& experts,
                     const std::vector<int64_t>& slots, const std::vector<int>& precisions, bool first, bool last,
                     uint64_t out, bool add_residual, int threads) {
    require(slots.size() == experts.size() && (precisions.empty() || precisions.size() == experts.size()),
            "experts, slots and precisions must have as many entries");
    std::vector<uint8_t> prefix_only;
    for (const int precision : precisions) prefix_only.push_back(precision == 2);
    nb::gil_scoped_release release;
    half.run(buffers, rows,
             {experts.data(), slots.data(), prefix_only.empty() ? nullptr : prefix_only.data(),
              static_cast<int64_t>(experts.size())},
             first, last, pointer<void>(out), add_residual, threads);
}

// What the calling thread's scratch comes to hold in forwards of at most `tokens` tokens: the most of any kernel, and the
// most of what joins kernels. Inputs of matrices have at most `widest` columns, heads together included.
int64_t scratch_bytes(const std::vector<const Record*>& experts, int64_t tokens, int hidden, int widest,
                      int num_experts, int threads) {
    require(tokens > 0 && hidden > 0 && widest > 0 && num_experts > 0 && threads > 0, "all sizes must be positive");
    const int64_t rows = std::min(tokens, kMaxRows);
    int64_t kernels = std::max(linear_scratch_bytes(std::max(hidden, widest), tokens, threads),
                               gate_scratch_bytes(hidden, tokens, threads));
    for (const Record* record : experts) {
        require(record->count == 2, "an expert needs two matrices");
        kernels = std::max(kernels, experts_scratch_bytes(*record, tokens, threads));
    }
    kernels = std::max(kernels, most_attention_scratch_bytes(widest, threads));
    const int64_t callers = std::max({most_mixer_scratch_bytes(hidden, widest, rows, threads),
                                      gated_mlp_scratch_bytes(widest, DType::kFloat32, tokens),
                                      choice_scratch_bytes(num_experts, tokens, threads)});
    return kernels + callers;
}

void bind_objects(nb::module_& m) {
    nb::class_<Norm>(m, "Norm")
        .def("__init__", [](Norm* at, uint64_t weight, int cols, float eps, bool round_before_scale, bool plus_one) {
            require(weight == 0 || cols > 0, "a norm needs columns");
            new (at) Norm{pointer<const void>(weight), cols, eps, round_before_scale, plus_one};
        }, "weight"_a, "cols"_a, "eps"_a, "round_before_scale"_a, "plus_one"_a);
    nb::class_<Dense>(m, "PackedMatrix")
        .def("__init__", [](Dense* at, const Record& record, uint64_t packed, uint64_t bias) {
            new (at) Dense{matrix_of(record, 0, false, packed), pointer<const void>(bias)};
        }, "record"_a, "packed"_a, "bias"_a);
    nb::class_<Router>(m, "Router")
        .def("__init__", [](Router* at, uint64_t weight, int experts, int hidden, int top_k, bool renormalize,
                            int score_dtype, const ChoiceOf& how) {
            new (at) Router(make_router(weight, experts, hidden, top_k, renormalize, score_dtype, how));
        }, "weight"_a, "experts"_a, "hidden"_a, "top_k"_a, "renormalize"_a, "score_dtype"_a, "how"_a);
    nb::class_<SharedExpert>(m, "SharedExpert")
        .def("__init__", [](SharedExpert* at, const Dense& gate, const Dense& up, const Dense& down, uint64_t share) {
            new (at) SharedExpert(make_shared_expert(gate, up, down, share));
        }, "gate"_a, "up"_a, "down"_a, "share"_a);
    nb::class_<DecodeBuffers>(m, "Buffers")
        .def("__init__", &make_buffers, "rows"_a, "hidden"_a, "top_k"_a, "num_experts"_a, "dtype"_a, "residual"_a,
             "normed"_a, "logits"_a, "scores"_a, "indices"_a)
        .def("bytes", &DecodeBuffers::bytes)
        .def("route", &route_rows_of)
        .def("choose", &choose);
    nb::class_<Mixer>(m, "Mixer");
    nb::class_<Attention, Mixer>(m, "Attention")
        .def(nb::new_(&make_attention), "query"_a, "key"_a, "value"_a, "output"_a, "query_norm"_a, "key_norm"_a,
             "head_dim"_a, "scale"_a, "gated"_a, "sinks"_a, "dtype"_a);
    nb::class_<LatentAttention, Mixer>(m, "LatentAttention")
        .def("__init__", [](LatentAttention* at, int hidden, int dtype, const Dense* query_down, const Norm& query_norm,
                            const Dense& query, const Dense& latent, const Norm& latent_norm, uint64_t key_up,
                            const Dense& up, const Dense& output, const LatentShape& shape, float scale) {
            LatentAttention made(hidden, static_cast<DType>(dtype));
            fill_latent(made, query_down, query_norm, query, latent, latent_norm, key_up, up, output, shape, scale);
            new (at) LatentAttention(made);
        }, "hidden"_a, "dtype"_a, "query_down"_a.none(), "query_norm"_a, "query"_a, "latent"_a, "latent_norm"_a,
             "key_up"_a, "up"_a, "output"_a, "shape"_a, "scale"_a);
    nb::class_<DeltaRule, Mixer>(m, "DeltaRule")
        .def("__init__", [](DeltaRule* at, int hidden, int dtype, const std::vector<InputOf>& inputs, uint64_t conv,
                            uint64_t conv_bias, uint64_t decay, uint64_t dt_bias, const Norm& norm, const Dense& output,
                            const DeltaShape& shape) {
            DeltaRule made(hidden, static_cast<DType>(dtype));
            fill_delta(made, inputs, conv, conv_bias, decay, dt_bias, norm, output, shape);
            new (at) DeltaRule(made);
        }, "hidden"_a, "dtype"_a, "inputs"_a, "conv"_a, "conv_bias"_a, "decay"_a, "dt_bias"_a, "norm"_a, "output"_a,
             "shape"_a)
        .def("run", &run_delta_rule);
    nb::class_<MixerHalf>(m, "MixerHalf")
        .def("__init__", [](MixerHalf* at, const Norm& input_norm, const Norm& post_norm, const Mixer& mixer) {
            new (at) MixerHalf(make_mixer_half(input_norm, post_norm, mixer));
        }, "input_norm"_a, "post_norm"_a, "mixer"_a, nb::keep_alive<1, 4>())
        .def("run", &run_mixer_half, "buffers"_a, "router"_a.none(), "x"_a, "rows"_a, "rotary"_a.none(), "kv"_a.none(),
             "states"_a.none(), "threads"_a);
    nb::class_<ExpertHalf>(m, "ExpertHalf")
        .def("__init__", [](ExpertHalf* at, const Record& record, const ExpertActivation& activation,
                            const BiasesOf& biases, const SharedExpert* shared, uint64_t pool, int64_t pool_bytes,
                            int64_t slot_bytes, int hidden, int dtype) {
            new (at) ExpertHalf(make_expert_half(record, activation, biases, shared, pool, pool_bytes, slot_bytes,
                                                 hidden, dtype));
        }, "record"_a, "activation"_a, "biases"_a, "shared"_a.none(), "pool"_a, "pool_bytes"_a, "slot_bytes"_a,
             "hidden"_a, "dtype"_a)
        .def("run", &run_expert_half);
}

void bind_operations(nb::module_& m) {
    m.def("scratch_bytes", &scratch_bytes);
    m.def("scratch_held", &Scratch::held);
    m.def("norm_rows", [](const Norm& norm, uint64_t x, int dtype, int64_t rows, uint64_t out, int threads) {
        nb::gil_scoped_release release;
        rms_norm(norm, pointer<const void>(x), static_cast<DType>(dtype), rows, pointer<void>(out), threads);
    });
    m.def("route_rows", [](const Router& router, uint64_t x, int dtype, int64_t tokens, uint64_t logits,
                           uint64_t scores, uint64_t indices, int threads) {
        nb::gil_scoped_release release;
        route(router, pointer<const void>(x), static_cast<DType>(dtype), tokens,
              {pointer<void>(logits), pointer<void>(scores), pointer<int64_t>(indices)}, threads);
    });
    m.def("multiply_rows", [](uint64_t weights, uint64_t x, int dtype, int rows, int cols, int64_t tokens,
                              uint64_t out, int threads) {
        require(rows > 0 && cols > 0, "a matrix needs rows and columns");
        nb::gil_scoped_release release;
        multiply_few_rows(pointer<const void>(weights), pointer<const void>(x), static_cast<DType>(dtype), rows, cols,
                          tokens, pointer<void>(out), threads);
    });
    m.def("rank_rows", [](uint64_t weights, uint64_t x, int dtype, int experts, int hidden, int64_t tokens, int limit,
                          int threads) {
        require(experts > 0 && hidden > 0 && limit > 0, "a router needs experts, a hidden size and a limit");
        std::vector<std::vector<std::pair<int, float>>> ranked;
        {
            nb::gil_scoped_release release;
            ranked = rank_experts(pointer<const void>(weights), pointer<const void>(x), static_cast<DType>(dtype),
                                  experts, hidden, tokens, limit, threads);
        }
        return ranked;
    });
    m.def("gated_rows", [](const Dense& gate, const Dense& up, const Dense& down, uint64_t x, int dtype, int64_t tokens,
                           uint64_t out, int threads) {
        require_gated_mlp(gate.matrix, up.matrix, down.matrix);
        nb::gil_scoped_release release;
        gated_mlp(gate, up, down, pointer<const void>(x), static_cast<DType>(dtype), tokens, pointer<void>(out),
                  threads);
    });
    m.def("add_gated_logits", [](uint64_t experts, uint64_t shared, uint64_t logits, int dtype, int64_t tokens,
                                 int hidden, uint64_t out, int threads) {
        nb::gil_scoped_release release;
        add_gated_logits(pointer<const void>(experts), pointer<const void>(shared), pointer<const void>(logits),
                         static_cast<DType>(dtype), tokens, hidden, pointer<void>(out), threads);
    });
    m.def("silu_times", [](uint64_t gate, uint64_t up, int dtype, int64_t tokens, int64_t inner, int threads) {
        nb::gil_scoped_release release;
        silu_times(pointer<void>(gate), pointer<const void>(up), static_cast<DType>(dtype), tokens, inner, threads);
    });
    m.def("add_gated_rows", [](uint64_t experts, uint64_t shared, uint64_t x, uint64_t share, int dtype, int64_t tokens,
                               int hidden, uint64_t out, int threads) {
        require(hidden > 0, "rows need columns");
        nb::gil_scoped_release release;
        add_gated(pointer<const void>(experts), pointer<const void>(shared), pointer<const void>(x),
                  pointer<const void>(share), static_cast<DType>(dtype), tokens, hidden, pointer<void>(out), threads);
    });
}

}  // namespace

void bind_decode(nb::module_& m) {
    bind_objects(m);
    bind_operations(m);
}

}  // namespace fate
