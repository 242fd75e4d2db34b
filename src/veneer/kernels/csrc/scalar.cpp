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
    template <int64_t CHUNK>
    void add(const uint8_t* codes, int64_t groups, const Levels8& levels, const Bytes& x, int64_t at,
             const float (&scales)[M][CHUNK]) {
        for (int m = 0; m < M; ++m) {
            const int8_t *even = x.lanes + 2 * m * x.stride + at * (GROUP / 2), *odd = even + x.stride;
            for (int64_t g = 0; g < groups; ++g) {
                int sum = 0;
                for (int64_t i = g * (GROUP / 2); i < (g + 1) * (GROUP / 2); ++i)
                    sum += levels.values[codes[i] >> 4] * even[i] + levels.values[codes[i] & 15] * odd[i];
                sums[m] += static_cast<double>(scales[m][g]) * sum;
            }
        }
    }
    double total(int m) const { return sums[m]; }
};

}  // namespace
}  // namespace veneer

#include "body.h"

namespace veneer {
const Variant scalar{"scalar", quantise, dequantise, dequantise_bf16, product, product8, nearest};
}
