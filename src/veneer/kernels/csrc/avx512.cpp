// Sixteen elements at a time (AVX-512 F, BW, VL, DQ, VNNI): a table of sixteen is one register, and tails are masks.
#include <immintrin.h>

#include "kernels.h"

namespace veneer {
namespace {

inline int64_t least(int64_t a, int64_t b);
inline int64_t greatest(int64_t a, int64_t b);

inline __mmask16 first16(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }
inline __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

// The boundaries as a binary tree, each level looked up in one register.
struct Levels {
    __m512 root, second, third, fourth;
    explicit Levels(const float* b)
        : root(_mm512_set1_ps(b[7])),
          second(_mm512_setr_ps(b[3], b[11], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
          third(_mm512_setr_ps(b[1], b[5], b[9], b[13], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
          fourth(_mm512_setr_ps(b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14], 0, 0, 0, 0, 0, 0, 0, 0)) {}

    __m512i interval(__m512 value) const {
        const __m512i one = _mm512_set1_epi32(1);
        const auto deeper = [value, one](__m512i found, __m512 boundary) {  // 2 · found, and 1 more above the boundary
            const __m512i twice = _mm512_add_epi32(found, found);
            return _mm512_mask_add_epi32(twice, _mm512_cmp_ps_mask(value, boundary, _CMP_GT_OQ), twice, one);
        };
        __m512i found = deeper(_mm512_setzero_si512(), root);
        found = deeper(found, _mm512_permutexvar_ps(found, second));
        found = deeper(found, _mm512_permutexvar_ps(found, third));
        return deeper(found, _mm512_permutexvar_ps(found, fourth));
    }
};

// The bits of |x| order as |x| does, infinity and NaN above all numbers: one maximum finds both.
inline float largest(const float* x, int64_t n) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16) {
        const __m512i bits = _mm512_maskz_loadu_epi32(first16(n - i), x + i);
        most = _mm512_max_epi32(most, _mm512_and_si512(bits, magnitude));
    }
    const int bits = _mm512_reduce_max_epi32(most);
    float found;
    __builtin_memcpy(&found, &bits, 4);
    return found;
}

inline void encode(const float* x, int64_t n, float reciprocal, const Levels& levels, const Quantise& q, uint8_t* codes) {
    const __m512 by = _mm512_set1_ps(reciprocal);
    const __m256i order = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q.order)));
    const __m256i weights = _mm256_set1_epi16(0x0110);  // 16 · the first code + the second
    for (int64_t i = 0; i < n; i += 32) {
        const __m512 x0 = _mm512_maskz_loadu_ps(first16(n - i), x + i);
        const __m512 x1 = _mm512_maskz_loadu_ps(first16(greatest(n - i - 16, 0)), x + i + 16);
        const __m128i c0 = _mm512_cvtepi32_epi8(levels.interval(_mm512_mul_ps(x0, by)));
        const __m128i c1 = _mm512_cvtepi32_epi8(levels.interval(_mm512_mul_ps(x1, by)));
        const __m256i bytes = _mm256_shuffle_epi8(order, _mm256_inserti128_si256(_mm256_castsi128_si256(c0), c1, 1));
        const __m128i pairs = _mm256_cvtepi16_epi8(_mm256_maddubs_epi16(bytes, weights));
        _mm_mask_storeu_epi8(codes + i / 2, first16((n - i + 1) / 2), pairs);
    }
}

template <class Out>
struct Lookup;

template <>
struct Lookup<float> {
    __m512 values;
    Lookup(const float* table, float scale) : values(_mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(scale))) {}
    float one(int code) const {
        return _mm512_cvtss_f32(_mm512_permutexvar_ps(_mm512_set1_epi32(code), values));
    }
    __m512 sixteen(__m512i index) const { return _mm512_permutexvar_ps(index, values); }  // of which bits 0–3 count
};

// The sixteen values rounded once, and twice in the register of 32: bit 4 of an index then makes no difference.
template <>
struct Lookup<uint16_t> {
    __m512i values;
    Lookup(const float* table, float scale) {
        const __m512 exact = _mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(scale));
        const __m512i bits = _mm512_castps_si512(exact);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 nan = _mm512_cmp_ps_mask(exact, exact, _CMP_UNORD_Q);
        const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0));
        values = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(rounded));
    }
    uint16_t one(int code) const {
        const __m512i found = _mm512_permutexvar_epi16(_mm512_set1_epi16(static_cast<short>(code)), values);
        return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm512_castsi512_si128(found)));
    }
};

// 32 codes in order, each in a byte with bits of its neighbour above it.
inline __m256i in_order(__m128i both) {
    const __m128i firsts = _mm_srli_epi16(both, 4);
    const __m128i low = _mm_unpacklo_epi8(firsts, both), high = _mm_unpackhi_epi8(firsts, both);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

inline void expand(const uint8_t* codes, int64_t n, const Lookup<float>& lookup, float* out) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
        const __m128i firsts = _mm_srli_epi16(both, 4);
        const __m512i index0 = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(firsts, both));
        const __m512i index1 = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(firsts, both));
        _mm512_storeu_ps(out + i, lookup.sixteen(index0));
        _mm512_storeu_ps(out + i + 16, lookup.sixteen(index1));
    }
    if (i < n) {
        const __m256i index = in_order(_mm_maskz_loadu_epi8(first16((n - i + 1) / 2), codes + i / 2));
        const __m512i index0 = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(index));
        const __m512i index1 = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(index, 1));
        _mm512_mask_storeu_ps(out + i, first16(n - i), lookup.sixteen(index0));
        _mm512_mask_storeu_ps(out + i + 16, first16(greatest(n - i - 16, 0)), lookup.sixteen(index1));
    }
}

inline void expand(const uint8_t* codes, int64_t n, const Lookup<uint16_t>& lookup, uint16_t* out) {
    for (int64_t i = 0; i < n; i += 32) {
        const __m256i index = in_order(_mm_maskz_loadu_epi8(first16((n - i + 1) / 2), codes + i / 2));
        const __m512i values = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(index), lookup.values);
        _mm512_mask_storeu_epi16(out + i, first32(n - i), values);
    }
}

template <int M>
struct Sums {
    __m512 sums[M][2];  // two each, so that one addition need not wait for the last
    Sums() {
        for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
    }
    void add(const uint8_t* codes, int64_t bytes, const Lookup<float>& lookup, const Tokens& x, int parity, int64_t at) {
        for (int64_t i = 0; i < bytes; i += 16) {
            const __mmask16 mask = first16(bytes - i);
            const __m512i both = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, codes + i));
            const __m512 first = lookup.sixteen(_mm512_srli_epi32(both, 4)), second = lookup.sixteen(both);
            for (int m = 0; m < M; ++m) {
                const __m512 x0 = _mm512_maskz_loadu_ps(mask, x.lane(parity, m, 0) + at + i);
                const __m512 x1 = _mm512_maskz_loadu_ps(mask, x.lane(parity, m, 1) + at + i);
                // Masked: beyond the end code 0 would still multiply, and an infinite scale make it a NaN.
                sums[m][0] = _mm512_mask3_fmadd_ps(first, x0, sums[m][0], mask);
                sums[m][1] = _mm512_mask3_fmadd_ps(second, x1, sums[m][1], mask);
            }
        }
    }
    float total(int m) const { return _mm512_reduce_add_ps(_mm512_add_ps(sums[m][0], sums[m][1])); }
};

// dpbusd wants one side without a sign: the levels plus 128. What that adds is in the corrections of x.
struct Levels8 {
    __m512i values;
    explicit Levels8(const int8_t* levels)
        : values(_mm512_broadcast_i32x4(_mm_xor_si128(
              _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)), _mm_set1_epi8(static_cast<char>(0x80))))) {}
};

// A lane is the sum over eight columns: four lanes a group.
template <int M>
struct Sums8 {
    __m512 sums[M];
    Sums8() {
        for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps();
    }
    template <int64_t GROUPS>
    void add(const uint8_t* codes, int64_t groups, const Levels8& levels, const Bytes& x, int64_t at,
             const float (&scales)[M][GROUPS]) {
        const __m512i four_each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        for (int64_t g = 0; g < groups; g += 4) {  // beyond the end x is zero, and so must the scale be
            const int64_t n = least(groups - g, 4);
            const __mmask64 bytes = ~0ull >> (64 - n * (GROUP / 2));
            const __mmask8 some = static_cast<__mmask8>((1u << n) - 1);
            looked_up(_mm512_maskz_loadu_epi8(bytes, codes + g * (GROUP / 2)), levels, x, at + g, [&](int m) {
                const __m128 of_groups = _mm_maskz_loadu_ps(some, &scales[m][g]);
                return _mm512_permutexvar_ps(four_each, _mm512_castps128_ps512(of_groups));
            });
        }
    }
    void add_blocks(const uint8_t* codes, int64_t blocks, const Levels8& levels, const Bytes& x, const float* scales) {
        const __m512i eight_each = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        const auto two = [&](__m512i both, int64_t b, __m128 of_blocks) {
            const __m512 lanes = _mm512_permutexvar_ps(eight_each, _mm512_castps128_ps512(of_blocks));
            looked_up(both, levels, x, 2 * b, [&](int m) { return _mm512_mul_ps(lanes, scale_lanes(x, m, 2 * b)); });
        };
        int64_t b = 0;
#pragma GCC unroll 2
        for (; b + 2 <= blocks; b += 2) {
            __builtin_prefetch(codes + b * GROUP + 4096);
            two(_mm512_loadu_si512(codes + b * GROUP), b,
                _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + b))));
        }
        if (b < blocks)
            two(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + b * GROUP))), b,
                _mm_load_ss(scales + b));
    }
    void add_bytes(const uint8_t* even, const uint8_t* odd, int64_t groups, const Bytes& x) {
        for (int64_t g = 0; g < groups; g += 4) {
            __builtin_prefetch(even + g * (GROUP / 2) + 2048);
            __builtin_prefetch(odd + g * (GROUP / 2) + 2048);
            four(_mm512_loadu_si512(even + g * (GROUP / 2)), _mm512_loadu_si512(odd + g * (GROUP / 2)), x, g,
                 [&](int m) { return scale_lanes(x, m, g); });
        }
    }
    static __m512 scale_lanes(const Bytes& x, int m, int64_t group) {
        return _mm512_loadu_ps(x.scale_lanes + m * (x.stride / 4) + group * (GROUP / 8));
    }
    template <class LanesOf>
    void looked_up(__m512i both, const Levels8& levels, const Bytes& x, int64_t group, const LanesOf& scales) {
        const __m512i nibble = _mm512_set1_epi8(15);
        four(_mm512_shuffle_epi8(levels.values, _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble)),
             _mm512_shuffle_epi8(levels.values, _mm512_and_si512(both, nibble)), x, group, scales);
    }
    // Four groups: the codes of even and of odd columns, plus 128; scales(m) for each eight columns.
    template <class LanesOf>
    void four(__m512i first, __m512i second, const Bytes& x, int64_t group, const LanesOf& scales) {
        for (int m = 0; m < M; ++m) {
            const int8_t* even = x.lanes + 2 * m * x.stride + group * (GROUP / 2);
            __m512i found = _mm512_loadu_si512(x.corrections + m * (x.stride / 4) + group * (GROUP / 8));
            found = _mm512_dpbusd_epi32(found, first, _mm512_loadu_si512(even));
            found = _mm512_dpbusd_epi32(found, second, _mm512_loadu_si512(even + x.stride));
            sums[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(found), scales(m), sums[m]);
        }
    }
    float total(int m) const { return _mm512_reduce_add_ps(sums[m]); }
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
const Variant avx512{"avx512", quantise, quantise8, dequantise, dequantise_bf16, dequantise8, dequantise8_bf16,
                     nearest, product, round8, product_int8, product_wide, product8, product_dense, attend,
                     PASSES<float>, PASSES<uint16_t>, update, update_backward, dequantise_part, dequantise8_part,
                     round_blocks, nullptr, nullptr, nullptr, nullptr, nullptr};
}
