// x of a few tokens, laid out for the products of 4-bit and 8-bit weights, in room of its own. Not for the variants.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"

namespace veneer {

struct Free {
    void operator()(void* room) const { std::free(room); }
};

// Room that begins with a cache line: a vector across two of them takes twice as long to load.
template <class T>
std::unique_ptr<T[], Free> lines(int64_t count) {
    void* room = std::aligned_alloc(64, (count * sizeof(T) + 64) / 64 * 64);  // never nothing
    if (!room) throw std::bad_alloc();
    return std::unique_ptr<T[], Free>(static_cast<T*>(room));
}

class TokensRoom {
public:
    TokensRoom(const float* x, int count, int64_t columns)
        : lanes(lines<float>(parities(columns) * count * 2 * stride(columns))),
          tokens{lanes.get(), stride(columns), x, columns, count} {
        for (int parity = 0; parity < parities(columns); ++parity)
            for (int m = 0; m < count; ++m)
                for (int half = 0; half < 2; ++half) {
                    float* lane = lanes.get() + ((parity * count + m) * 2 + half) * stride(columns);
                    for (int64_t i = parity + half; i < columns; i += 2) *lane++ = x[m * columns + i];
                }
    }

private:
    // Rows of odd length begin in the middle of a byte every other time.
    static int parities(int64_t columns) { return columns % 2 ? 2 : 1; }
    // An odd number of cache lines: lanes share no cache set.
    static int64_t stride(int64_t columns) { return 16 * ((columns / 2 / 16 + 1) | 1); }
    std::unique_ptr<float[], Free> lanes;

public:
    const Tokens tokens;
};

class BytesRoom {  // filled in by `round8`
public:
    BytesRoom(const float* x, int count, int64_t columns)
        : lanes(lines<int8_t>(2 * count * stride(columns))),
          corrections(lines<int32_t>(count * stride(columns) / 4)),
          scales(lines<float>(count * stride(columns) / 4 + count * (columns / GROUP))),
          bytes{lanes.get(), corrections.get(), scales.get() + count * stride(columns) / 4, scales.get(), stride(columns),
                x, columns, count} {}

private:
    static int64_t stride(int64_t columns) { return (columns + 127) / 128 * 64; }
    std::unique_ptr<int8_t[], Free> lanes;
    std::unique_ptr<int32_t[], Free> corrections;
    std::unique_ptr<float[], Free> scales;  // the lanes first, which then begin with a cache line

public:
    const Bytes bytes;
};

}  // namespace veneer
