// Eight elements at a time (AVX2 and FMA).
#include <immintrin.h>

#include "kernels.h"

namespace veneer {
namespace {
#include "tail.h"

inline int interval(float value, const float* boundaries);
inline uint16_t rounded_to_bf16(float value);

// The boundaries as a binary tree, each level small enough to be looked up in one register.
struct Levels {
    __m256 root, second, third, fourth;
    explicit Levels(const float* b)
        : root(_mm256_set1_ps(b[7])),
          second(_mm256_setr_ps(b[3], b[11], 0, 0, 0, 0, 0, 0)),
          third(_mm256_setr_ps(b[1], b[5], b[9], b[13], 0, 0, 0, 0)),
          fourth(_mm256_setr_ps(b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14])) {}

    __m256i interval(__m256 value) const {
        const auto deeper = [value](__m256i found, __m256 boundary) {  // 2 · found, and 1 more above the boundary
            const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(value, boundary, _CMP_GT_OQ));
            return _mm256_sub_epi32(_mm256_add_epi32(found, found), above);
        };
        __m256i found = deeper(_mm256_setzero_si256(), root);
        found = deeper(found, _mm256_permutevar8x32_ps(second, found));
        found = deeper(found, _mm256_permutevar8x32_ps(third, found));
        return deeper(found, _mm256_permutevar8x32_ps(fourth, found));
    }
};

inline float largest(const float* x, int64_t n) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i most0 = _mm256_setzero_si256(), most1 = most0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i + 8));
        most0 = _mm256_max_epi32(most0, _mm256_and_si256(a, magnitude));
        most1 = _mm256_max_epi32(most1, _mm256_and_si256(b, magnitude));
    }
    most0 = _mm256_max_epi32(most0, most1);
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(most0), _mm256_extracti128_si256(most0, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    const int most = _mm_cvtsi128_si32(half);
    return largest_from(static_cast<uint32_t>(most), x, i, n);
}

inline void encode(const float* x, int64_t n, float reciprocal, const Levels& levels, const Quantise& q, uint8_t* codes) {
    const __m256 by = _mm256_set1_ps(reciprocal);
    const __m256i order = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q.order)));
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i weights = _mm256_set1_epi16(0x0110);  // 16 · the first code + the second
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i c[4];
        for (int k = 0; k < 4; ++k) c[k] = levels.interval(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * k), by));
        const __m256i words = _mm256_packus_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
        const __m256i bytes = _mm256_shuffle_epi8(order, _mm256_permutevar8x32_epi32(words, in_order));
        const __m256i pairs = _mm256_maddubs_epi16(bytes, weights);
        const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i / 2), packed);
    }
    for (; i < n; i += 2) {
        const int high = q.order[interval(x[i] * reciprocal, q.boundaries)];
        const int low = q.order[interval(i + 1 < n ? x[i + 1] * reciprocal : 0.0f, q.boundaries)];
        codes[i / 2] = static_cast<uint8_t>(high << 4 | low);
    }
}

template <class Out>
struct Lookup;

// Two registers of eight: the code's fourth bit says which.
template <>
struct Lookup<float> {
    __m256 low, high;
    alignas(32) float values[16];
    Lookup(const float* table, float scale)
        : low(_mm256_mul_ps(_mm256_loadu_ps(table), _mm256_set1_ps(scale))),
          high(_mm256_mul_ps(_mm256_loadu_ps(table + 8), _mm256_set1_ps(scale))) {
        _mm256_store_ps(values, low);
        _mm256_store_ps(values + 8, high);
    }
    float one(int code) const { return values[code]; }

    // Of index only bits 0–2 count, of fourth only bit 31.
    __m256 eight(__m256i index, __m256i fourth) const {
        return _mm256_blendv_ps(
            _mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), _mm256_castsi256_ps(fourth));
    }
};

// The sixteen values rounded once, their bytes in two registers.
template <>
struct Lookup<uint16_t> {
    __m128i low, high;
    uint16_t values[16];
    Lookup(const float* table, float scale) {
        alignas(16) uint8_t lows[16], highs[16];
        for (int i = 0; i < 16; ++i) {
            values[i] = rounded_to_bf16(table[i] * scale);
            lows[i] = static_cast<uint8_t>(values[i]);
            highs[i] = static_cast<uint8_t>(values[i] >> 8);
        }
        low = _mm_load_si128(reinterpret_cast<const __m128i*>(lows));
        high = _mm_load_si128(reinterpret_cast<const __m128i*>(highs));
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
        const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
        const __m128i firsts = _mm_srli_epi16(both, 4);  // with bits of the neighbour above them, which nobody reads
        const __m128i in_order[2] = {_mm_unpacklo_epi8(firsts, both), _mm_unpackhi_epi8(firsts, both)};
        for (int k = 0; k < 4; ++k) {
            const __m128i eight = k & 1 ? _mm_srli_si128(in_order[k / 2], 8) : in_order[k / 2];
            const __m256i index = _mm256_cvtepu8_epi32(eight);
            _mm256_storeu_ps(out + i + 8 * k, lookup.eight(index, _mm256_slli_epi32(index, 28)));
        }
    }
    expand_rest(codes, i, n, lookup, out);
}

inline void expand(const uint8_t* codes, int64_t n, const Lookup<uint16_t>& lookup, uint16_t* out) {
    const __m128i nibble = _mm_set1_epi8(15);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
        const __m128i firsts = _mm_and_si128(_mm_srli_epi16(both, 4), nibble), seconds = _mm_and_si128(both, nibble);
        const __m128i in_order[2] = {_mm_unpacklo_epi8(firsts, seconds), _mm_unpackhi_epi8(firsts, seconds)};
        for (int k = 0; k < 2; ++k) {
            const __m128i low = _mm_shuffle_epi8(lookup.low, in_order[k]);
            const __m128i high = _mm_shuffle_epi8(lookup.high, in_order[k]);
            __m128i* to = reinterpret_cast<__m128i*>(out + i + 16 * k);
            _mm_storeu_si128(to, _mm_unpacklo_epi8(low, high));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(low, high));
        }
    }
    expand_rest(codes, i, n, lookup, out);
}

// With few tokens two sums each, so that one addition need not wait for the last; with many there is enough to do.
template <int M>
struct Sums {
    static constexpr int CHAINS = M <= 3 ? 2 : 1;
    __m256 sums[M][CHAINS];
    float rest[M] = {};
    Sums() {
        for (int m = 0; m < M; ++m)
            for (int c = 0; c < CHAINS; ++c) sums[m][c] = _mm256_setzero_ps();
    }
    void add(const uint8_t* codes, int64_t bytes, const Lookup<float>& lookup, const Tokens& x, int parity, int64_t at) {
        int64_t i = 0;
        for (; i + 8 <= bytes; i += 8) {
            const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
            const __m256 first = lookup.eight(_mm256_srli_epi32(both, 4), _mm256_slli_epi32(both, 24));
            const __m256 second = lookup.eight(both, _mm256_slli_epi32(both, 28));
            for (int m = 0; m < M; ++m) {
                const __m256 x0 = _mm256_loadu_ps(x.lane(parity, m, 0) + at + i);
                const __m256 x1 = _mm256_loadu_ps(x.lane(parity, m, 1) + at + i);
                sums[m][0] = _mm256_fmadd_ps(first, x0, sums[m][0]);
                sums[m][CHAINS - 1] = _mm256_fmadd_ps(second, x1, sums[m][CHAINS - 1]);
            }
        }
        for (; i < bytes; ++i)
            for (int m = 0; m < M; ++m) {
                rest[m] += lookup.values[codes[i] >> 4] * x.lane(parity, m, 0)[at + i];
                rest[m] += lookup.values[codes[i] & 15] * x.lane(parity, m, 1)[at + i];
            }
    }
    float total(int m) const {
        const __m256 sum = CHAINS == 2 ? _mm256_add_ps(sums[m][0], sums[m][CHAINS - 1]) : sums[m][0];
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        half = _mm_add_ss(half, _mm_movehdup_ps(half));
        return _mm_cvtss_f32(half) + rest[m];
    }
};

struct Levels8 {
    __m256i values;
    explicit Levels8(const int8_t* levels)
        : values(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)))) {}
};

// The sums of level · x over pairs: |x| with the sign moved to the level, for one side of maddubs has none. Both are at
// most 127, so that 16 bits hold a pair's sum.
inline __m256i pairs(__m256i level, __m256i x) {
    return _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(level, x));
}

// A lane is the sum over eight columns: four lanes a group.
template <int M>
struct Sums8 {
    __m256 sums[M];
    Sums8() {
        for (int m = 0; m < M; ++m) sums[m] = _mm256_setzero_ps();
    }
    template <int64_t GROUPS>
    void add(const uint8_t* codes, int64_t groups, const Levels8& levels, const Bytes& x, int64_t at,
             const float (&scales)[M][GROUPS]) {
        int64_t g = 0;
        for (; g + 2 <= groups; g += 2)
            looked_up(load(codes + g * (GROUP / 2)), levels, x, at + g,
                      [&](int m) { return four_each(scales[m][g], scales[m][g + 1]); });
        if (g < groups) {
            const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + g * (GROUP / 2)));
            looked_up(_mm256_set_m128i(_mm_setzero_si128(), both), levels, x, at + g,
                      [&](int m) { return four_each(scales[m][g], 0); });
        }
    }
    void add_blocks(const uint8_t* codes, int64_t blocks, const Levels8& levels, const Bytes& x, const float* scales) {
        for (int64_t b = 0; b < blocks; ++b) {
            const __m256 scale = _mm256_set1_ps(scales[b]);
            looked_up(load(codes + b * GROUP), levels, x, 2 * b,
                      [&](int m) { return _mm256_mul_ps(scale, scale_lanes(x, m, 2 * b)); });
        }
    }
    void add_bytes(const uint8_t* even, const uint8_t* odd, int64_t groups, const Bytes& x) {
        const __m256i offset = _mm256_set1_epi8(static_cast<char>(0x80));
        for (int64_t g = 0; g < groups; g += 2)
            two(_mm256_xor_si256(load(even + g * (GROUP / 2)), offset),
                _mm256_xor_si256(load(odd + g * (GROUP / 2)), offset), x, g,
                [&](int m) { return scale_lanes(x, m, g); });
    }
    static __m256i load(const uint8_t* codes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)); }
    static __m256 four_each(float first, float second) {
        return _mm256_set_m128(_mm_set1_ps(second), _mm_set1_ps(first));
    }
    static __m256 scale_lanes(const Bytes& x, int m, int64_t group) {
        return _mm256_loadu_ps(x.scale_lanes + m * (x.stride / 4) + group * (GROUP / 8));
    }
    template <class LanesOf>
    void looked_up(__m256i both, const Levels8& levels, const Bytes& x, int64_t group, const LanesOf& scales) {
        const __m256i nibble = _mm256_set1_epi8(15);
        two(_mm256_shuffle_epi8(levels.values, _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble)),
            _mm256_shuffle_epi8(levels.values, _mm256_and_si256(both, nibble)), x, group, scales);
    }
    // Two groups: the values of even and of odd columns; scales(m) for each eight columns.
    template <class LanesOf>
    void two(__m256i first, __m256i second, const Bytes& x, int64_t group, const LanesOf& scales) {
        const __m256i ones = _mm256_set1_epi16(1);
        for (int m = 0; m < M; ++m) {
            const int8_t* even = x.lanes + 2 * m * x.stride + group * (GROUP / 2);
            const __m256i x0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even));
            const __m256i x1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + x.stride));
            const __m256i found = _mm256_add_epi32(
                _mm256_madd_epi16(pairs(first, x0), ones), _mm256_madd_epi16(pairs(second, x1), ones));
            sums[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(found), scales(m), sums[m]);
        }
    }
    float total(int m) const {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(sums[m]), _mm256_extractf128_ps(sums[m], 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        half = _mm_add_ss(half, _mm_movehdup_ps(half));
        return _mm_cvtss_f32(half);
    }
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
const Variant avx2{"avx2", quantise, quantise8, dequantise, dequantise_bf16, dequantise8, dequantise8_bf16,
                   nearest, product, round8, product_int8, product_wide, product8, product_dense, attend,
                   PASSES<float>, PASSES<uint16_t>, update, update_backward, dequantise_part, dequantise8_part,
                   round_blocks, nullptr, nullptr, nullptr, nullptr, nullptr};
}
