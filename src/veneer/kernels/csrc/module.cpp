// The Python module: which variants this machine runs, and their functions on addresses. veneer.kernels.cpu has checked
// every tensor's type, size and layout before it passes an address on.
#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "addresses.h"
#include "decode.h"
#include "heap.h"
#include "kernels.h"
#include "module_16.h"
#include "room.h"
#include "threads.h"
#include "variants.h"

namespace nb = nanobind;
using namespace veneer;

namespace {

void quantise4(const std::string& name, Address source, int64_t count, Address boundaries, Address order, int64_t block,
               Address codes, Address absmax, int threads) {
    variant(name).quantise({at<const float>(source), count, at<const float>(boundaries), at<const uint8_t>(order), block,
                            at<uint8_t>(codes), at<float>(absmax)},
                           threads);
}

void quantise8(const std::string& name, Address source, int64_t count, Address boundaries, int64_t block, Address codes,
               Address absmax, int threads) {
    variant(name).quantise8({at<const float>(source), count, at<const float>(boundaries), nullptr, block,
                             at<uint8_t>(codes), at<float>(absmax)},
                            threads);
}

void nearest8(const std::string& name, Address values, int64_t count, Address boundaries, Address found, int threads) {
    variant(name).nearest(at<const float>(values), count, at<const float>(boundaries), at<uint8_t>(found), threads);
}

void round_blocks(const std::string& name, Address values, int64_t blocks, int bits, bool least, Address out,
                  int threads) {
    const Variant& v = variant(name);
    const GgufBlocks all{at<const float>(values), bits, least, at<uint8_t>(out)};
    share(blocks * GGUF_BLOCK, threads, [&](int part, int parts) {
        const Rows mine = rows_of(blocks, part, parts);
        v.round_blocks(all, mine.first, mine.last);
    });
}

void dequantise4(const std::string& name, Address codes, Address table, Address scales, Address nested_table,
                 Address nested_scales, Address offset, int64_t block, int nested_shift, int64_t start, int64_t stop,
                 Address out, bool bf16, int threads) {
    const Packed w = packed(codes, table, scales, nested_table, nested_scales, offset, block, nested_shift);
    if (bf16)
        variant(name).dequantise_bf16(w, start, stop, at<uint16_t>(out), threads);
    else
        variant(name).dequantise(w, start, stop, at<float>(out), threads);
}

void dequantise8(const std::string& name, Address codes, Address scales, Address nested_table, Address nested_scales,
                 Address offset, int64_t block, int nested_shift, int64_t start, int64_t stop, Address out, bool bf16,
                 int threads) {
    const Packed w = packed(codes, 0, scales, nested_table, nested_scales, offset, block, nested_shift);
    if (bf16)
        variant(name).dequantise8_bf16(w, start, stop, at<uint16_t>(out), threads);
    else
        variant(name).dequantise8(w, start, stop, at<float>(out), threads);
}

void product4(const std::string& name, Address x, int tokens, Address codes, Address table, Address scales,
              Address nested_table, Address nested_scales, Address offset, int64_t block, int nested_shift, int64_t rows,
              int64_t columns, Address out, int threads) {
    const Variant& v = variant(name);
    const Packed w = packed(codes, table, scales, nested_table, nested_scales, offset, block, nested_shift);
    const TokensRoom room(at<const float>(x), tokens, columns);
    share(rows * columns, threads, [&](int part, int parts) {
        v.product(w, room.tokens, rows_of(rows, part, parts), at<float>(out));
    });
}

void product8(const std::string& name, Address x, int tokens, Address codes, Address scales, Address nested_table,
              Address nested_scales, Address offset, int64_t block, int nested_shift, int64_t rows, int64_t columns,
              Address out, int threads) {
    const Variant& v = variant(name);
    const Packed w = packed(codes, 0, scales, nested_table, nested_scales, offset, block, nested_shift);
    share(rows * columns, threads, [&](int part, int parts) {
        v.product8(w, at<const float>(x), tokens, columns, rows_of(rows, part, parts), at<float>(out));
    });
}

void product4_int8(const std::string& name, Address x, int tokens, Address codes, Address levels, float step,
                   Address scales, Address nested_table, Address nested_scales, Address offset, int64_t block,
                   int nested_shift, int64_t rows, int64_t columns, Address out, int threads) {
    const Variant& v = variant(name);
    const Packed w = packed(codes, 0, scales, nested_table, nested_scales, offset, block, nested_shift);
    const BytesRoom room(at<const float>(x), tokens, columns);
    v.round8(room.bytes);
    share(rows * columns, threads, [&](int part, int parts) {
        v.product_int8(w, at<const int8_t>(levels), step, room.bytes, rows_of(rows, part, parts), at<float>(out));
    });
}

void product8_int8(const std::string& name, Address x, int tokens, Address codes, Address scales, int64_t rows,
                   int64_t columns, Address out, int threads) {
    const Variant& v = variant(name);
    const BytesRoom room(at<const float>(x), tokens, columns);
    const Wide w{at<const uint8_t>(codes), at<const float>(scales)};
    v.round8(room.bytes);
    share(rows * columns, threads, [&](int part, int parts) {
        v.product_wide(w, room.bytes, rows_of(rows, part, parts), at<float>(out));
    });
}

// work(passes, a number) by the passes of numbers in fp32, or in bf16.
template <class Work>
void in_type(const std::string& name, bool bf16, const Work& work) {
    const Variant& v = variant(name);
    if (bf16)
        work(v.bf16, uint16_t{});
    else
        work(v.fp32, float{});
}

void rms_norm(const std::string& name, Address x, Address weight, float eps, bool once, int64_t rows, int64_t width,
              Address out, Address inverses, bool bf16, int threads) {
    in_type(name, bf16, [&](const auto& passes, auto number) {
        using T = decltype(number);
        share(rows * width, threads, [&](int part, int parts) {
            const Rows mine = rows_of(rows, part, parts);
            const int64_t at_row = mine.first * width;
            passes.normalise(at<const T>(x) + at_row, at<const float>(weight), eps, once, mine.last - mine.first, width,
                             at<T>(out) + at_row, at<float>(inverses) + mine.first);
        });
    });
}

void rms_norm_backward(const std::string& name, Address grad, Address x, Address inverses, Address weight, bool once,
                       int64_t rows, int64_t width, Address out, bool bf16, int threads) {
    in_type(name, bf16, [&](const auto& passes, auto number) {
        using T = decltype(number);
        share(rows * width, threads, [&](int part, int parts) {
            const Rows mine = rows_of(rows, part, parts);
            const int64_t at_row = mine.first * width;
            passes.normalise_backward(at<const T>(grad) + at_row, at<const T>(x) + at_row,
                                      at<const float>(inverses) + mine.first, at<const float>(weight), once,
                                      mine.last - mine.first, width, at<T>(out) + at_row);
        });
    });
}

void gated(const std::string& name, Address gate, Address up, int64_t count, bool gelu, Address out, bool bf16,
           int threads) {
    in_type(name, bf16, [&](const auto& passes, auto number) {
        using T = decltype(number);
        share(count, threads, [&](int part, int parts) {
            const Rows mine = rows_of(count, part, parts);
            passes.gate(at<const T>(gate) + mine.first, at<const T>(up) + mine.first, mine.last - mine.first, gelu,
                        at<T>(out) + mine.first);
        });
    });
}

void gated_backward(const std::string& name, Address grad, Address gate, Address up, int64_t count, bool gelu,
                    Address grad_gate, Address grad_up, bool bf16, int threads) {
    in_type(name, bf16, [&](const auto& passes, auto number) {
        using T = decltype(number);
        share(count, threads, [&](int part, int parts) {
            const Rows mine = rows_of(count, part, parts);
            passes.gate_backward(at<const T>(grad) + mine.first, at<const T>(gate) + mine.first,
                                 at<const T>(up) + mine.first, mine.last - mine.first, gelu,
                                 at<T>(grad_gate) + mine.first, at<T>(grad_up) + mine.first);
        });
    });
}

// logits (rows, width), labels (rows,), losses (rows,).
void cross_entropy(const std::string& name, Address logits, Address labels, int64_t rows, int64_t width, float smoothing,
                   bool gradient, Address losses, bool bf16, int threads) {
    const int64_t* first = at<const int64_t>(labels);
    const bool all_there = std::all_of(first, first + rows, [&](int64_t label) { return 0 <= label && label < width; });
    if (!all_there) throw std::out_of_range("a label is not among " + std::to_string(width) + " logits");
    in_type(name, bf16, [&](const auto& passes, auto number) {
        using T = decltype(number);
        share(rows * width, threads, [&](int part, int parts) {
            const Rows mine = rows_of(rows, part, parts);
            const auto room = lines<float>(bf16 && gradient ? width : 0);
            passes.cross_entropy(at<T>(logits) + mine.first * width, first + mine.first, mine.last - mine.first, width,
                                 smoothing, gradient, room.get(), at<double>(losses) + mine.first);
        });
    });
}

// to (columns, rows) ← by · from (rows, columns), of this part's columns.
void transposed(const float* from, int64_t rows, int64_t columns, float by, float* to, int part, int parts) {
    const Rows mine = rows_of(columns, part, parts);
    for (int64_t column = mine.first; column < mine.last; ++column)
        for (int64_t row = 0; row < rows; ++row) to[column * rows + row] = by * from[row * columns + column];
}

// x (tokens, into), A (rank, into), B (out, rank): low (tokens, rank) ← x Aᵀ, y (tokens, out) ← y + scale · low Bᵀ.
void update_product(const std::string& name, Address x, Address A, Address B, float scale, int64_t tokens, int64_t into,
                    int64_t out, int64_t rank, Address low, Address y, int threads) {
    const Variant& v = variant(name);
    const auto Bt = lines<float>(rank * out);
    const Updated u{at<const float>(x), at<const float>(A), Bt.get(), into, out, rank, at<float>(low), at<float>(y)};
    share(tokens * (into + out), threads, [&](int part, int parts) {
        transposed(at<const float>(B), out, rank, scale, Bt.get(), part, parts);
        wait_for_all();
        const Rows mine = rows_of(tokens, part, parts);
        v.update(u, mine.first, mine.last);
    });
}

// The gradients of A (rank, into) and B (out, rank); that of x is added to grad_x, if that is not 0.
void update_product_backward(const std::string& name, Address grad, Address x, Address low, Address A, Address B,
                             float scale, int64_t tokens, int64_t into, int64_t out, int64_t rank, Address grad_x,
                             Address grad_A, Address grad_B, int threads) {
    const Variant& v = variant(name);
    const int64_t of_A = rank * into, each = rank * (into + out + UPDATE_TOKENS);
    const auto Bt = lines<float>(rank * out), sums = lines<float>(threads * each);
    const UpdateBackward u{at<const float>(grad), at<const float>(x), at<const float>(low), at<const float>(A), Bt.get(),
                           into, out, rank, at<float>(grad_x)};
    share(tokens * (into + out), threads, [&](int part, int parts) {
        transposed(at<const float>(B), out, rank, scale, Bt.get(), part, parts);
        float* own = sums.get() + part * each;
        std::fill(own, own + each, 0.0f);
        wait_for_all();
        const Rows mine = rows_of(tokens, part, parts);
        v.update_backward(u, mine.first, mine.last, {own, own + of_A, own + rank * (into + out)});
        wait_for_all();
        const Rows numbers = rows_of(rank * (into + out), part, parts);
        for (int other = 1; other < parts; ++other)
            for (int64_t i = numbers.first; i < numbers.last; ++i) sums[i] += sums[other * each + i];
        wait_for_all();
        const Rows of_grad_A = rows_of(of_A, part, parts);
        std::copy(sums.get() + of_grad_A.first, sums.get() + of_grad_A.last, at<float>(grad_A) + of_grad_A.first);
        transposed(sums.get() + of_A, rank, out, scale, at<float>(grad_B), part, parts);
    });
}

// x (batch, heads, tokens, dim) with these strides; cosines and sines (batch or 1, tokens, dim), out (batch, tokens,
// heads, dim).
void rotate(const std::string& name, Address x, int64_t of_batch, int64_t of_head, int64_t of_token, Address cosines,
            Address sines, bool for_all, int64_t batch, int heads, int64_t tokens, int dim, bool transposed, Address out,
            bool bf16, int threads) {
    in_type(name, bf16, [&](const auto& passes, auto number) {
        using T = decltype(number);
        share(batch * tokens * heads * dim, threads, [&](int part, int parts) {
            const Rows mine = rows_of(batch * tokens, part, parts);
            for (int64_t i = mine.first; i < mine.last; ++i) {
                const int64_t angles = (for_all ? i % tokens : i) * dim;
                passes.rotate(at<const T>(x) + i / tokens * of_batch + i % tokens * of_token, of_head,
                              at<const T>(cosines) + angles, at<const T>(sines) + angles, heads, dim, transposed,
                              at<T>(out) + i * heads * dim);
            }
        });
    });
}
Linear four_bits(Address codes, Address table, Address scales, Address nested_table, Address nested_scales,
                 Address offset, int64_t block, int nested_shift, int64_t rows, int64_t columns, Address levels,
                 float step) {
    Linear made{rows, columns};
    made.packed = packed(codes, table, scales, nested_table, nested_scales, offset, block, nested_shift);
    made.levels = at<const int8_t>(levels);
    made.step = step;
    return made;
}

Linear int8(Address codes, Address scales, Address nested_table, Address nested_scales, Address offset, int64_t block,
            int nested_shift, int64_t rows, int64_t columns) {
    Linear made{rows, columns};
    made.packed = packed(codes, 0, scales, nested_table, nested_scales, offset, block, nested_shift);
    return made;
}

Linear eight_bits(Address codes, Address scales, int64_t rows, int64_t columns) {
    Linear made{rows, columns};
    made.wide = {at<const uint8_t>(codes), at<const float>(scales)};
    return made;
}

Linear dense(Address weight, int64_t rows, int64_t columns) {
    Linear made{rows, columns};
    made.dense = at<const float>(weight);
    return made;
}

}  // namespace

NB_MODULE(_cpu, m) {
    using Unlocked = nb::call_guard<nb::gil_scoped_release>;
    m.def("variants", &variants);
    m.def("quantise4", &quantise4, Unlocked());
    m.def("quantise8", &quantise8, Unlocked());
    m.def("nearest8", &nearest8, Unlocked());
    m.def("round_blocks", &round_blocks, Unlocked());
    m.def("dequantise4", &dequantise4, Unlocked());
    m.def("dequantise8", &dequantise8, Unlocked());
    m.def("product4", &product4, Unlocked());
    m.def("product8", &product8, Unlocked());
    m.def("product4_int8", &product4_int8, Unlocked());
    m.def("product8_int8", &product8_int8, Unlocked());
    m.def("rms_norm", &rms_norm, Unlocked());
    m.def("rms_norm_backward", &rms_norm_backward, Unlocked());
    m.def("gated", &gated, Unlocked());
    m.def("gated_backward", &gated_backward, Unlocked());
    m.def("rotate", &rotate, Unlocked());
    m.def("cross_entropy", &cross_entropy, Unlocked());
    m.def("update_product", &update_product, Unlocked());
    m.def("update_product_backward", &update_product_backward, Unlocked());

    add_16_bits(m);

    m.def("use_heap", &use_heap);
    nb::class_<Heap>(m, "Heap")
        .def(nb::init<size_t, size_t, Heap::GiveBack>())
        .def("take", &Heap::take)
        .def("let_go", &Heap::let_go)
        .def_prop_ro("held", &Heap::held);

    nb::class_<Linear>(m, "Linear")
        .def_static("four_bits", &four_bits)
        .def_static("int8", &int8)
        .def_static("eight_bits", &eight_bits)
        .def_static("dense", &dense)
        .def("set_bias", [](Linear& self, Address bias) { self.bias = at<const float>(bias); })
        .def("add_update", [](Linear& self, Address A, Address B, int64_t rank, float scale) {
            self.updates.push_back({at<const float>(A), at<const float>(B), rank, scale});
        });
    nb::class_<Decoder>(m, "Decoder")
        .def("__init__",
             [](Decoder* self, const std::string& name, int heads, int key_heads, int dim, int64_t room, float scaling,
                float eps, Address cosines, Address sines, Address norm, const Linear& head) {
                 new (self) Decoder(variant(name), {heads, key_heads, dim, room, scaling, eps, at<const float>(cosines),
                                                    at<const float>(sines)},
                                    at<const float>(norm), head);
             })
        .def("add_layer",
             [](Decoder& self, const std::vector<Address>& norms, const std::vector<Linear>& linears, Address keys,
                Address values) {
                 if (norms.size() != 4 || linears.size() != 7)
                     throw std::invalid_argument("a layer has four norms and seven linear layers");
                 self.layers.push_back({at<const float>(norms[0]), at<const float>(norms[1]), at<const float>(norms[2]),
                                        at<const float>(norms[3]), linears[0], linears[1], linears[2], linears[3],
                                        linears[4], linears[5], linears[6], at<float>(keys), at<float>(values)});
             })
        .def("step",
             [](const Decoder& self, Address x, Address sequences, Address positions, int count, Address logits,
                int threads) {
                 self.step(at<float>(x), at<const int64_t>(sequences), at<const int64_t>(positions), count,
                           at<float>(logits), threads);
             },
             Unlocked());
}
