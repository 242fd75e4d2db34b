// The Python module: which variants this machine runs, and their functions on addresses. veneer.kernels.cpu has checked
// every tensor's type, size and layout before it passes an address on.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace veneer;

namespace {

using Address = uintptr_t;

std::vector<const Variant*> runnable() {
    std::vector<const Variant*> found{&scalar};
#ifdef VENEER_X86
    // These ask the processor, and whether the system saves its wide registers.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back(&avx2);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vnni"))
            found.push_back(&avx512);
    }
#endif
#ifdef VENEER_ARM
    found.push_back(&neon);
#endif
    return found;
}

const Variant& variant(const std::string& name) {
    static const std::vector<const Variant*> all = runnable();
    for (const Variant* one : all)
        if (name == one->name) return *one;
    throw std::invalid_argument("this machine has no variant " + name);
}

std::vector<std::string> variants() {
    std::vector<std::string> names;
    for (const Variant* one : runnable()) names.emplace_back(one->name);
    return names;
}

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

struct Free {
    void operator()(void* room) const { std::free(room); }
};

// Room that begins with a cache line: a vector across two of them takes twice as long to load.
template <class T>
std::unique_ptr<T[], Free> lines(int64_t count) {
    void* room = std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
    if (!room) throw std::bad_alloc();
    return std::unique_ptr<T[], Free>(static_cast<T*>(room));
}

// nested_table is 0 where the scales are fp32 themselves.
Packed packed(Address codes, Address table, Address scales, Address nested_table, Address nested_scales, Address offset,
              int64_t block, int nested_shift) {
    Scales found{};
    if (nested_table) {
        found = {nullptr, at<const uint8_t>(scales), at<const float>(nested_table), at<const float>(nested_scales),
                 at<const float>(offset), nested_shift};
    } else {
        found.values = at<const float>(scales);
    }
    return {at<const uint8_t>(codes), at<const float>(table), found, block};
}

void quantise4(const std::string& name, Address source, int64_t count, Address boundaries, Address order, int64_t block,
               Address codes, Address absmax, int threads) {
    variant(name).quantise({at<const float>(source), count, at<const float>(boundaries), at<const uint8_t>(order), block,
                            at<uint8_t>(codes), at<float>(absmax)},
                           threads);
}

void nearest8(const std::string& name, Address values, int64_t count, Address boundaries, Address found, int threads) {
    variant(name).nearest(at<const float>(values), count, at<const float>(boundaries), at<uint8_t>(found), threads);
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

void product4(const std::string& name, Address x, int tokens, Address codes, Address table, Address scales,
              Address nested_table, Address nested_scales, Address offset, int64_t block, int nested_shift, int64_t rows,
              int64_t columns, Address out, int threads) {
    const Packed w = packed(codes, table, scales, nested_table, nested_scales, offset, block, nested_shift);
    const float* source = at<const float>(x);
    const int parities = columns % 2 ? 2 : 1;  // rows of odd length begin in the middle of a byte every other time
    const int64_t stride = 16 * ((columns / 2 / 16 + 1) | 1);  // an odd number of cache lines: lanes share no cache set
    const std::unique_ptr<float[]> lanes(new float[parities * tokens * 2 * stride]);
    for (int parity = 0; parity < parities; ++parity)
        for (int m = 0; m < tokens; ++m)
            for (int half = 0; half < 2; ++half) {
                float* lane = lanes.get() + ((parity * tokens + m) * 2 + half) * stride;
                for (int64_t i = parity + half; i < columns; i += 2) *lane++ = source[m * columns + i];
            }
    variant(name).product(w, {lanes.get(), stride, source, columns, tokens}, rows, at<float>(out), threads);
}

void product4_int8(const std::string& name, Address x, int tokens, Address codes, Address levels, float step,
                   Address scales, Address nested_table, Address nested_scales, Address offset, int64_t block,
                   int nested_shift, int64_t rows, int64_t columns, Address out, int threads) {
    const Packed w = packed(codes, 0, scales, nested_table, nested_scales, offset, block, nested_shift);
    const int64_t stride = (columns + 127) / 128 * 64;
    const auto lanes = lines<int8_t>(tokens * 2 * stride);
    const auto corrections = lines<int32_t>(tokens * stride / 4);
    const auto of_groups = lines<float>(tokens * columns / GROUP);
    const Bytes bytes{lanes.get(), corrections.get(), of_groups.get(), stride, at<const float>(x), columns, tokens};
    variant(name).product8(w, at<const int8_t>(levels), step, bytes, rows, at<float>(out), threads);
}

}  // namespace

NB_MODULE(_cpu, m) {
    using Unlocked = nb::call_guard<nb::gil_scoped_release>;
    m.def("variants", &variants);
    m.def("quantise4", &quantise4, Unlocked());
    m.def("nearest8", &nearest8, Unlocked());
    m.def("dequantise4", &dequantise4, Unlocked());
    m.def("product4", &product4, Unlocked());
    m.def("product4_int8", &product4_int8, Unlocked());
}
