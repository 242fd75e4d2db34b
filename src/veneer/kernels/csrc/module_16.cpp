// The functions of the Python module that compute in bf16 by tiles, on addresses as the others.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "addresses.h"
#include "attention.h"
#include "module_16.h"
#include "threads.h"
#include "variants.h"

namespace nb = nanobind;

namespace veneer {
namespace {

Weight16 dense16(int kind, Address values, int64_t rows, int64_t columns, int64_t stride) {
    return {static_cast<Weight16::Kind>(kind), at<const void>(values), rows, columns, stride, {}};
}

Weight16 four_bits16(Address codes, Address table, Address scales, Address nested_table, Address nested_scales,
                     Address offset, int64_t block, int nested_shift, int64_t rows, int64_t columns) {
    return {Weight16::CODES4, nullptr, rows, columns, columns,
            packed(codes, table, scales, nested_table, nested_scales, offset, block, nested_shift)};
}

Weight16 int8_16(Address codes, Address scales, Address nested_table, Address nested_scales, Address offset,
                 int64_t block, int nested_shift, int64_t rows, int64_t columns) {
    return {Weight16::CODES8, nullptr, rows, columns, columns,
            packed(codes, 0, scales, nested_table, nested_scales, offset, block, nested_shift)};
}

// Where a weight is kept as (into, out), x is its rows' side.
Adapted adapted_of(Address x, int64_t tokens, const Weight16& weight, bool transposed, Address bias, Address A, Address B,
                   int64_t rank, float scale, Address low, Address y) {
    const int64_t into = transposed ? weight.rows : weight.columns, out = transposed ? weight.columns : weight.rows;
    return {at<const uint16_t>(x), tokens, into, out, rank, weight, transposed, at<const float>(bias), at<const float>(A),
            at<const float>(B), scale, at<uint16_t>(low), at<uint16_t>(y), nullptr};
}

int parts_of(const Adapted& a, int threads) { return a.tokens * (a.into + a.out) > WORTH_SHARING ? threads : 1; }

// Bytes of the room that the two functions below compute in; it begins with a cache line.
int64_t adapted_room(const std::string& name, int64_t tokens, const Weight16& weight, bool transposed, int64_t rank,
                     int threads) {
    const Adapted a = adapted_of(0, tokens, weight, transposed, 0, 0, 0, rank, 0, 0, 0);
    return variant(name).tiled_room(a, parts_of(a, threads));
}

// Rows of bf16 (tokens, into) by a weight and an update of it, if the rank is not 0: low (tokens, rank), y (tokens, out).
void adapted(const std::string& name, Address x, int64_t tokens, const Weight16& weight, bool transposed, Address bias,
             Address A, Address B, int64_t rank, float scale, Address low, Address y, Address room, int threads) {
    const Variant& v = variant(name);
    Adapted a = adapted_of(x, tokens, weight, transposed, bias, A, B, rank, scale, low, y);
    a.room = at<char>(room);
    const int parts = parts_of(a, threads);
    int64_t rows = 0, panels = 0;
    share(tokens * (a.into + a.out), parts, [&](int part, int) {
        v.lay_out(a, {part, parts, &rows});
        wait_for_all();
        v.multiply(a, {part, parts, &panels});
    });
}

// Its gradients: of x unless grad_x is 0, of A and B unless these are.
void adapted_backward(const std::string& name, Address grad, Address x, int64_t tokens, const Weight16& weight,
                      bool transposed, Address A, Address B, int64_t rank, float scale, Address low, Address grad_x,
                      Address grad_A, Address grad_B, Address room, int threads) {
    const Variant& v = variant(name);
    AdaptedBackward b{adapted_of(x, tokens, weight, transposed, 0, A, B, rank, scale, low, 0), at<const uint16_t>(grad),
                      at<uint16_t>(grad_x), at<float>(grad_A), at<float>(grad_B)};
    Adapted& a = b.forward;
    a.room = at<char>(room);
    const int parts = parts_of(a, threads);
    int64_t rows = 0, panels = 0;
    share(tokens * (a.into + a.out), parts, [&](int part, int) {
        v.lay_out_backward(b, {part, parts, &rows});
        wait_for_all();
        v.multiply_backward(b, {part, parts, &panels});
    });
}

// Where bf16 (tokens, heads, dim) lies: its address, and the distances between tokens and between heads.
using Place = std::tuple<Address, int64_t, int64_t>;

Heads heads_at(const Place& place) {
    return {at<const uint16_t>(std::get<0>(place)), std::get<1>(place), std::get<2>(place)};
}

// window 0: all keys.
RowAttention row_attention(const Place& queries, const Place& keys, const Place& values,
                           const std::vector<int64_t>& lengths, int heads, int key_heads, int dim, float scaling,
                           bool causal, int64_t window) {
    const int64_t tokens = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    return {heads_at(queries), heads_at(keys), heads_at(values), tokens, heads, key_heads, dim, scaling, causal,
            window ? window : std::numeric_limits<int64_t>::max()};
}

void attend(const Place& queries, const Place& keys, const Place& values, const std::vector<int64_t>& lengths,
            int heads, int key_heads, int dim, float scaling, bool causal, int64_t window, Address out, Address lse,
            int threads) {
    attention(row_attention(queries, keys, values, lengths, heads, key_heads, dim, scaling, causal, window), lengths,
              {at<uint16_t>(out), at<float>(lse)}, threads);
}

void attend_backward(const Place& grad, const Place& queries, const Place& keys, const Place& values, const Place& out,
                     Address lse, const std::vector<int64_t>& lengths, int heads, int key_heads, int dim,
                     float scaling, bool causal, int64_t window, Address grad_queries, Address grad_keys,
                     Address grad_values, int threads) {
    attention_backward(row_attention(queries, keys, values, lengths, heads, key_heads, dim, scaling, causal, window),
                       lengths,
                       {heads_at(grad), heads_at(out), at<const float>(lse), at<uint16_t>(grad_queries),
                        at<uint16_t>(grad_keys), at<uint16_t>(grad_values)},
                       threads);
}

}  // namespace

void add_16_bits(nb::module_& m) {
    using Unlocked = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<Weight16>(m, "Weight16")
        .def_static("dense", &dense16)
        .def_static("four_bits", &four_bits16)
        .def_static("int8", &int8_16);
    m.def("has_tiles", [](const std::string& name) { return variant(name).multiply != nullptr; });
    m.def("adapted_room", &adapted_room);
    m.def("adapted", &adapted, Unlocked());
    m.def("adapted_backward", &adapted_backward, Unlocked());
    m.def("attention", &attend, Unlocked());
    m.def("attention_backward", &attend_backward, Unlocked());
}

}  // namespace veneer
