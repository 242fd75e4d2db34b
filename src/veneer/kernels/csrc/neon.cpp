// Four elements at a time (AArch64's NEON, which every such processor has): tables of sixteen are looked up by bytes.
#include <arm_neon.h>
#define VENEER_NEON  // for lanes.h: these instructions are there

#include "kernels.h"

namespace veneer {
namespace {
#include "tail.h"

inline int interval(float value, const float* boundaries);
inline uint16_t rounded_to_bf16(float value);

struct Levels {
    float32x4_t boundaries[15];
    explicit Levels(const float* b) {
        for (int i = 0; i < 15; ++i) boundaries[i] = vdupq_n_f32(b[i]);
    }
    // How many boundaries lie below each value: a comparison that holds is -1.
    uint32x4_t interval(float32x4_t value) const {
        uint32x4_t found = vdupq_n_u32(0);
        for (int i = 0; i < 15; ++i) found = vsubq_u32(found, vcgtq_f32(value, boundaries[i]));
        return found;
    }
};

inline float largest(const float* x, int64_t n) {
    const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
    uint32x4_t lanes = vdupq_n_u32(0);
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) lanes = vmaxq_u32(lanes, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), magnitude));
    const uint32_t most = vmaxvq_u32(lanes);
    return largest_from(most, x, i, n);
}

inline void encode(const float* x, int64_t n, float reciprocal, const Levels& levels, const Quantise& q, uint8_t* codes) {
    const uint8x16_t order = vld1q_u8(q.order);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        uint8x16_t bytes[2];
        for (int half = 0; half < 2; ++half) {
            uint16x4_t words[4];
            for (int k = 0; k < 4; ++k)
                words[k] = vmovn_u32(levels.interval(vmulq_n_f32(vld1q_f32(x + i + 16 * half + 4 * k), reciprocal)));
            const uint8x8_t low = vmovn_u16(vcombine_u16(words[0], words[1]));
            const uint8x8_t high = vmovn_u16(vcombine_u16(words[2], words[3]));
            bytes[half] = vqtbl1q_u8(order, vcombine_u8(low, high));
        }
        const uint8x16_t firsts = vuzp1q_u8(bytes[0], bytes[1]), seconds = vuzp2q_u8(bytes[0], bytes[1]);
        vst1q_u8(codes + i / 2, vorrq_u8(vshlq_n_u8(firsts, 4), seconds));
    }
    for (; i < n; i += 2) {
        const int high = q.order[interval(x[i] * reciprocal, q.boundaries)];
        const int low = q.order[interval(i + 1 < n ? x[i + 1] * reciprocal : 0.0f, q.boundaries)];
        codes[i / 2] = static_cast<uint8_t>(high << 4 | low);
    }
}

// 32 codes in order.
inline uint8x16x2_t in_order(uint8x16_t both) {
    return vzipq_u8(vshrq_n_u8(both, 4), vandq_u8(both, vdupq_n_u8(15)));
}

template <class Out>
struct Lookup;

template <>
struct Lookup<float> {
    float values[16];
    uint8x16x4_t bytes;
    Lookup(const float* table, float scale) {
        for (int k = 0; k < 4; ++k) {
            const float32x4_t four = vmulq_n_f32(vld1q_f32(table + 4 * k), scale);
            vst1q_f32(values + 4 * k, four);
            bytes.val[k] = vreinterpretq_u8_f32(four);
        }
    }
    float one(int code) const { return values[code]; }

    // The values of sixteen codes: each code's four bytes stand at four times the code.
    void sixteen(uint8x16_t codes, float32x4_t out[4]) const {
        const uint8x16_t byte = vreinterpretq_u8_u32(vdupq_n_u32(0x03020100));
        const uint8x16_t first = vshlq_n_u8(codes, 2);
        const uint8x16x2_t twice = vzipq_u8(first, first);
        for (int k = 0; k < 2; ++k) {
            const uint8x16x2_t index = vzipq_u8(twice.val[k], twice.val[k]);
            for (int j = 0; j < 2; ++j)
                out[2 * k + j] = vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vorrq_u8(index.val[j], byte)));
        }
    }
};

// The sixteen values rounded once, their bytes in two registers.
template <>
struct Lookup<uint16_t> {
    uint8x16_t low, high;
    uint16_t values[16];
    Lookup(const float* table, float scale) {
        for (int i = 0; i < 16; ++i) values[i] = rounded_to_bf16(table[i] * scale);
        const uint8x16x2_t apart = vld2q_u8(reinterpret_cast<const uint8_t*>(values));
        low = apart.val[0];
        high = apart.val[1];
    }
    uint16_t one(int code) const { return values[code]; }
};

template <class Out>
inline void expand_rest(const uint8_t* codes, int64_t i, int64_t n, const Lookup<Out>& lookup, Out* out) {
    for (; i < n; ++i) out[i] = lookup.values[i & 1 ? codes[i / 2] & 15 : codes[i / 2] >> 4];
}

inline void expand(const uint8_t* codes, int64_t n, const Lookup<float>& lookup, float* out) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const uint8x16x2_t index = in_order(vld1q_u8(codes + i / 2));
        for (int half = 0; half < 2; ++half) {
            float32x4_t values[4];
            lookup.sixteen(index.val[half], values);
            for (int k = 0; k < 4; ++k) vst1q_f32(out + i + 16 * half + 4 * k, values[k]);
        }
    }
    expand_rest(codes, i, n, lookup, out);
}

inline void expand(const uint8_t* codes, int64_t n, const Lookup<uint16_t>& lookup, uint16_t* out) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const uint8x16x2_t index = in_order(vld1q_u8(codes + i / 2));
        for (int half = 0; half < 2; ++half) {
            const uint8x16_t codes16 = index.val[half];
            const uint8x16x2_t apart{{vqtbl1q_u8(lookup.low, codes16), vqtbl1q_u8(lookup.high, codes16)}};
            vst2q_u8(reinterpret_cast<uint8_t*>(out + i + 16 * half), apart);
        }
    }
    expand_rest(codes, i, n, lookup, out);
}

template <int M>
struct Sums {
    float32x4_t sums[M][2];  // two each, so that one addition need not wait for the last
    float rest[M] = {};
    Sums() {
        for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = vdupq_n_f32(0);
    }
    void add(const uint8_t* codes, int64_t bytes, const Lookup<float>& lookup, const Tokens& x, int parity, int64_t at) {
        int64_t i = 0;
        for (; i + 16 <= bytes; i += 16) {
            const uint8x16_t both = vld1q_u8(codes + i);
            float32x4_t first[4], second[4];
            lookup.sixteen(vshrq_n_u8(both, 4), first);
            lookup.sixteen(vandq_u8(both, vdupq_n_u8(15)), second);
            for (int m = 0; m < M; ++m) {
                const float *x0 = x.lane(parity, m, 0) + at + i, *x1 = x.lane(parity, m, 1) + at + i;
                for (int k = 0; k < 4; ++k) {
                    sums[m][0] = vfmaq_f32(sums[m][0], first[k], vld1q_f32(x0 + 4 * k));
                    sums[m][1] = vfmaq_f32(sums[m][1], second[k], vld1q_f32(x1 + 4 * k));
                }
            }
        }
        for (; i < bytes; ++i)
            for (int m = 0; m < M; ++m) {
                rest[m] += lookup.values[codes[i] >> 4] * x.lane(parity, m, 0)[at + i];
                rest[m] += lookup.values[codes[i] & 15] * x.lane(parity, m, 1)[at + i];
            }
    }
    float total(int m) const { return vaddvq_f32(vaddq_f32(sums[m][0], sums[m][1])) + rest[m]; }
};

struct Levels8 {
    int8x16_t values;
    explicit Levels8(const int8_t* levels) : values(vld1q_s8(levels)) {}
};

// The sums of level · x over pairs. Both are at most 127 in size, so that 16 bits hold a pair's sum.
inline int16x8_t pairs(int8x16_t level, int8x16_t x) {
    return vmlal_high_s8(vmull_s8(vget_low_s8(level), vget_low_s8(x)), level, x);
}

template <int M>
struct Sums8 {
    float32x4_t sums[M];
    Sums8() {
        for (int m = 0; m < M; ++m) sums[m] = vdupq_n_f32(0);
    }
    template <int64_t GROUPS>
    void add(const uint8_t* codes, int64_t groups, const Levels8& levels, const Bytes& x, int64_t at,
             const float (&scales)[M][GROUPS]) {
        for (int64_t g = 0; g < groups; ++g)
            looked_up(codes + g * (GROUP / 2), levels, x, at + g, [&](int m) { return scales[m][g]; });
    }
    void add_blocks(const uint8_t* codes, int64_t blocks, const Levels8& levels, const Bytes& x, const float* scales) {
        for (int64_t g = 0; g < 2 * blocks; ++g)
            looked_up(codes + g * (GROUP / 2), levels, x, g,
                      [&](int m) { return scales[g / 2] * x.scales[m * 2 * blocks + g]; });
    }
    void add_bytes(const uint8_t* even, const uint8_t* odd, int64_t groups, const Bytes& x) {
        const uint8x16_t offset = vdupq_n_u8(128);
        for (int64_t g = 0; g < groups; ++g) {
            const int8x16_t first = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(even + g * (GROUP / 2)), offset));
            const int8x16_t second = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(odd + g * (GROUP / 2)), offset));
            one(first, second, x, g, [&](int m) { return x.scales[m * groups + g]; });
        }
    }
    template <class ScaleOf>
    void looked_up(const uint8_t* codes, const Levels8& levels, const Bytes& x, int64_t group, const ScaleOf& scale) {
        const uint8x16_t both = vld1q_u8(codes);
        one(vqtbl1q_s8(levels.values, vshrq_n_u8(both, 4)), vqtbl1q_s8(levels.values, vandq_u8(both, vdupq_n_u8(15))), x,
            group, scale);
    }
    // A group: the values of even and of odd columns.
    template <class ScaleOf>
    void one(int8x16_t first, int8x16_t second, const Bytes& x, int64_t group, const ScaleOf& scale) {
        for (int m = 0; m < M; ++m) {
            const int8_t* even = x.lanes + 2 * m * x.stride + group * (GROUP / 2);
            int32x4_t found = vpaddlq_s16(pairs(first, vld1q_s8(even)));
            found = vpadalq_s16(found, pairs(second, vld1q_s8(even + x.stride)));
            sums[m] = vfmaq_n_f32(sums[m], vcvtq_f32_s32(found), scale(m));
        }
    }
    float total(int m) const { return vaddvq_f32(sums[m]); }
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
const Variant neon{"neon", quantise, quantise8, dequantise, dequantise_bf16, dequantise8, dequantise8_bf16,
                   nearest, product, round8, product_int8, product_wide, product8, product_dense, attend,
                   PASSES<float>, PASSES<uint16_t>, update, update_backward, dequantise_part, dequantise8_part,
                   round_blocks, nullptr, nullptr, nullptr, nullptr, nullptr};
}
