// One element at a time: for machines without vector code of their own here, and the easiest one to read.
#include "kernels.h"

namespace veneer {
namespace {
#include "tail.h"

inline int interval(float value, const float* boundaries);
inline uint16_t rounded_to_bf16(float value);

struct Levels {
    explicit Levels(const float*) {}
};

inline float largest(const float* x, int64_t n) {
    return largest_from(0, x, 0, n);
}

inline void encode(const float* x, int64_t n, float reciprocal, const Levels&, const Quantise& q, uint8_t* codes) {
    for (int64_t i = 0; i < n; i += 2) {
        const int high = q.order[interval(x[i] * reciprocal, q.boundaries)];
        const int low = q.order[interval(i + 1 < n ? x[i + 1] * reciprocal : 0.0f, q.boundaries)];
        codes[i / 2] = static_cast<uint8_t>(high << 4 | low);
    }
}

inline void put(float value, float& to) { to = value; }
inline void put(float value, uint16_t& to) { to = rounded_to_bf16(value); }

template <class Out>
struct Lookup {
    Out values[16];
    Lookup(const float* table, float scale) {
        for (int i = 0; i < 16; ++i) put(table[i] * scale, values[i]);
    }
    Out one(int code) const { return values[code]; }
};

template <class Out>
inline void expand(const uint8_t* codes, int64_t n, const Lookup<Out>& lookup, Out* out) {
    int64_t i = 0;
    for (; i + 1 < n; i += 2) {
        out[i] = lookup.values[codes[i / 2] >> 4];
        out[i + 1] = lookup.values[codes[i / 2] & 15];
    }
    if (i < n) out[i] = lookup.values[codes[i / 2] >> 4];
}

// One sum after another over a whole row loses digits that many lanes keep: so in fp64.
template <int M>
struct Sums {
    double sums[M] = {};
    void add(const uint8_t* codes, int64_t bytes, const Lookup<float>& lookup, const Tokens& x, int parity, int64_t at) {
        for (int m = 0; m < M; ++m) {
            const float *high = x.lane(parity, m, 0) + at, *low = x.lane(parity, m, 1) + at;
            for (int64_t i = 0; i < bytes; ++i) {
                sums[m] += static_cast<double>(lookup.values[codes[i] >> 4]) * high[i];
                sums[m] += static_cast<double>(lookup.values[codes[i] & 15]) * low[i];
            }
        }
    }
    double total(int m) const { return sums[m]; }
};

struct Levels8 {
    const int8_t* values;
    explicit Levels8(const int8_t* levels) : values(levels) {}
};

template <int M>
struct Sums8 {
    double sums[M] = {};
    template <int64_t GROUPS>
    void add(const uint8_t* codes, int64_t groups, const Levels8& levels, const Bytes& x, int64_t at,
             const float (&scales)[M][GROUPS]) {
        for (int m = 0; m < M; ++m)
            for (int64_t g = 0; g < groups; ++g) looked_up(codes, g, levels, x, m, at, scales[m][g]);
    }
    void add_blocks(const uint8_t* codes, int64_t blocks, const Levels8& levels, const Bytes& x, const float* scales) {
        for (int m = 0; m < M; ++m)
            for (int64_t g = 0; g < 2 * blocks; ++g)
                looked_up(codes, g, levels, x, m, 0, scales[g / 2] * x.scales[m * 2 * blocks + g]);
    }
    void add_bytes(const uint8_t* even, const uint8_t* odd, int64_t groups, const Bytes& x) {
        for (int m = 0; m < M; ++m) {
            const int8_t *x0 = x.lanes + 2 * m * x.stride, *x1 = x0 + x.stride;
            for (int64_t g = 0; g < groups; ++g) {
                int sum = 0;
                for (int64_t i = g * (GROUP / 2); i < (g + 1) * (GROUP / 2); ++i)
                    sum += (even[i] - 128) * x0[i] + (odd[i] - 128) * x1[i];
                sums[m] += static_cast<double>(x.scales[m * groups + g]) * sum;
            }
        }
    }
    void looked_up(const uint8_t* codes, int64_t g, const Levels8& levels, const Bytes& x, int m, int64_t at, float scale) {
        const int8_t *even = x.lanes + 2 * m * x.stride + at * (GROUP / 2), *odd = even + x.stride;
        int sum = 0;
        for (int64_t i = g * (GROUP / 2); i < (g + 1) * (GROUP / 2); ++i)
            sum += levels.values[codes[i] >> 4] * even[i] + levels.values[codes[i] & 15] * odd[i];
        sums[m] += static_cast<double>(scale) * sum;
    }
    double total(int m) const { return sums[m]; }
};

}  // namespace
}  // namespace veneer

#include "body.h"
#include "passes_body.h"
#include "cross_entropy_body.h"
#include "bytes_body.h"
#include "decode_body.h"
#include "update_body.h"
#include "gguf_body.h"

namespace veneer {
const Variant scalar{"scalar", quantise, quantise8, dequantise, dequantise_bf16, dequantise8, dequantise8_bf16,
                     nearest, product, round8, product_int8, product_wide, product8, product_dense, attend,
                     PASSES<float>, PASSES<uint16_t>, update, update_backward, dequantise_part, dequantise8_part,
                     round_blocks, nullptr, nullptr, nullptr, nullptr, nullptr};
}
