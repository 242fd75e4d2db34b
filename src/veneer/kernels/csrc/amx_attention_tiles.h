// Matrices of bf16 laid out as AMX tiles of 1 KB, and their products in fp32. For the files that are compiled for AMX.
//
// Of a matrix whose rows are tokens and whose columns are dimensions there are four layouts, by its place in a product
// (TDPBF16PS: C[m][n] += Σ A[m][2p] B[p][2n] + A[m][2p + 1] B[p][2n + 1]):
//   left             A in "x ·": 16 tokens × 32 dimensions
//   right transposed B in "· xᵀ": 16 pairs of dimensions × 16 tokens
//   right            B in "· x": 16 pairs of tokens × 16 dimensions
//   left transposed  A in "xᵀ ·": 16 dimensions × 32 tokens
// The first two are each other's transposed in 32 bits, and so are the last two. What lies beyond the tokens or the
// dimensions is 0.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "tiles.h"

namespace veneer {
namespace {

constexpr int64_t TILE = 512;     // bf16 numbers
using Numbers = uint16_t*;        // tiles, from a cache line on
using Rows16 = __m512i[16];

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Some tokens of one head: `count` rows, `stride` apart, of `dim` numbers.
struct Part {
    const uint16_t* data;
    int64_t stride, count;
    int dim;

    // Columns [32 k, 32 k + 32) of a row.
    __m512i line(int64_t row, int k) const {
        if (row >= count) return _mm512_setzero_si512();
        const uint16_t* at = data + row * stride + 32 * k;
        if (32 * k + 32 <= dim) return _mm512_loadu_si512(at);
        return _mm512_maskz_loadu_epi16(0xffff, at);
    }
};

inline void transpose(Rows16 r) {
    Rows16 t;
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

inline void store(const Rows16 r, Numbers tile) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + 32 * i, r[i]);
}

// Tiles [of 16 tokens][of 32 dimensions], for so many tokens, a multiple of 16. Either may be null.
inline void lay_out(const Part& x, int64_t tokens, Numbers left, Numbers right_transposed) {
    const int columns = (x.dim + 31) / 32;
    for (int64_t token = 0; token < tokens; token += 16)
        for (int k = 0; k < columns; ++k) {
            const int64_t place = (token / 16 * columns + k) * TILE;
            Rows16 r;
            for (int i = 0; i < 16; ++i) r[i] = x.line(token + i, k);
            if (left) store(r, left + place);
            if (!right_transposed) continue;
            transpose(r);
            store(r, right_transposed + place);
        }
}

// Tiles right [of 32 tokens][of 16 dimensions] and left transposed [of 16 dimensions][of 32 tokens], for so many
// tokens, a multiple of 32. Either may be null.
inline void lay_out_pairs(const Part& x, int64_t tokens, Numbers right, Numbers left_transposed) {
    alignas(64) static constexpr uint16_t FIRST[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first = _mm512_load_si512(FIRST), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    const int columns = x.dim / 16;
    for (int64_t token = 0; token < tokens; token += 32)
        for (int column = 0; column < columns; column += 2) {
            Rows16 r, beside;
            for (int p = 0; p < 16; ++p) {
                const __m512i a = x.line(token + 2 * p, column / 2), b = x.line(token + 2 * p + 1, column / 2);
                r[p] = _mm512_permutex2var_epi16(a, first, b);
                beside[p] = _mm512_permutex2var_epi16(a, second, b);
            }
            const auto keep = [&](Rows16 rows, int at) {
                if (right) store(rows, right + (token / 32 * columns + at) * TILE);
                if (!left_transposed) return;
                transpose(rows);
                store(rows, left_transposed + (at * (tokens / 32) + token / 32) * TILE);
            };
            keep(r, column);
            if (column + 1 < columns) keep(beside, column + 1);
        }
}

// Tiles of a matrix: the distance, in numbers, of a tile from the next along the product's own side, and along the sum.
struct Operand {
    const uint16_t* tiles;
    int64_t aside, along;
};

// C (16 M, 16 N), fp32 with rows `stride` apart, ← A B or, to `add`, C + A B: sums over `depth` tiles.
template <int M, int N>
inline void multiply(const Operand& a, const Operand& b, int64_t depth, bool add, float* c, int64_t stride) {
    settle();
    const int64_t bytes = 4 * stride;
    if (add) {
        _tile_loadd(0, c, bytes);
        if constexpr (N > 1) _tile_loadd(1, c + 16, bytes);
        if constexpr (M > 1) _tile_loadd(2, c + 16 * stride, bytes);
        if constexpr (M > 1 && N > 1) _tile_loadd(3, c + 16 * stride + 16, bytes);
    } else {
        _tile_zero(0);
        if constexpr (N > 1) _tile_zero(1);
        if constexpr (M > 1) _tile_zero(2);
        if constexpr (M > 1 && N > 1) _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; ++k) {
        const uint16_t *left = a.tiles + k * a.along, *right = b.tiles + k * b.along;
        _tile_loadd(4, left, 64);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (N > 1) {
            _tile_loadd(7, right + b.aside, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (M > 1) {
            _tile_loadd(5, left + a.aside, 64);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, bytes);
    if constexpr (N > 1) _tile_stored(1, c + 16, bytes);
    if constexpr (M > 1) _tile_stored(2, c + 16 * stride, bytes);
    if constexpr (M > 1 && N > 1) _tile_stored(3, c + 16 * stride + 16, bytes);
    settle();
}

// C (16 m, 16 n) of any number of tiles.
inline void multiply(int64_t m, int64_t n, const Operand& a, const Operand& b, int64_t depth, bool add, float* c,
                     int64_t stride) {
    for (int64_t j = 0; j < n; j += 2)
        for (int64_t i = 0; i < m; i += 2) {
            const Operand left{a.tiles + i * a.aside, a.aside, a.along}, right{b.tiles + j * b.aside, b.aside, b.along};
            float* at = c + 16 * (i * stride + j);
            if (i + 1 < m && j + 1 < n)
                multiply<2, 2>(left, right, depth, add, at, stride);
            else if (i + 1 < m)
                multiply<2, 1>(left, right, depth, add, at, stride);
            else if (j + 1 < n)
                multiply<1, 2>(left, right, depth, add, at, stride);
            else
                multiply<1, 1>(left, right, depth, add, at, stride);
        }
}

// 2^x to 3e-6 of it; 0 of −∞.
inline __m512 power_of_2(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 y = _mm512_set1_ps(0.013534168f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.052011464f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.24144275f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.69300383f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0000026f));
    return _mm512_scalef_ps(y, x);
}

// 32 numbers as bf16, to nearest even.
inline __m512i rounded(__m512 first, __m512 second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// A row of `dim` numbers times `by` → bf16.
inline void write(const float* from, float by, int dim, uint16_t* to) {
    const __m512 factor = _mm512_set1_ps(by);
    for (int i = 0; i < dim; i += 32) {
        const __mmask32 mask = i + 32 <= dim ? 0xffffffff : 0xffff;
        const __m512 second = i + 32 <= dim ? _mm512_load_ps(from + i + 16) : _mm512_setzero_ps();
        _mm512_mask_storeu_epi16(to + i, mask,
                                 rounded(_mm512_mul_ps(_mm512_load_ps(from + i), factor), _mm512_mul_ps(second, factor)));
    }
}

// Room for one row, taken piece by piece, each from a cache line on.
class Pieces {
public:
    explicit Pieces(void* room) : base(reinterpret_cast<uintptr_t>(room)) {}
    Numbers tiles(int64_t count) { return take<uint16_t>(count * TILE); }
    float* floats(int64_t count) { return take<float>(count); }
    int64_t taken() const { return static_cast<int64_t>(used); }

private:
    template <class T>
    T* take(int64_t count) {
        const uintptr_t at = base + used;
        used += (count * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T*>(at);
    }
    uintptr_t base, used = 0;
};

}  // namespace
}  // namespace veneer
