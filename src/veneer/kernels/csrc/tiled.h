// How matrices become tiles. Within each file's own unnamed namespace, after tiles.h.
//
// Rows are taken 32 at a time: a block of rows is, for each 32 columns, two tiles of sixteen rows as they lie. A panel is
// what such a block is multiplied by: for each 32 rows, two tiles of sixteen columns in pairs of rows. What lies beyond
// the end of a matrix is zeros, so that nothing later asks for an end.
#pragma once

#include "tiles.h"

namespace veneer {
namespace {

constexpr int64_t BLOCK = 32;                 // rows, or columns, at a time
constexpr int64_t TILE = 16 * 32;             // numbers
constexpr int64_t PAIR = 2 * TILE;

inline int64_t blocks_of(int64_t n, int64_t block = BLOCK) { return (n + block - 1) / block; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline __mmask32 first_of_32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }
inline __mmask16 first_of_16(int64_t n) {
    return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1);
}

// Up to 32 numbers in bf16, zeros behind them.
inline __m512i some(const uint16_t* from, int64_t n) {
    return n >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(first_of_32(n), from);
}
inline __m512i some(const float* from, int64_t n, float by = 1.0f) {
    const __m512 times = _mm512_set1_ps(by);
    const __m512 low = _mm512_maskz_loadu_ps(first_of_16(n), from);
    const __m512 high = n > 16 ? _mm512_maskz_loadu_ps(first_of_16(n - 16), from + 16) : _mm512_setzero_ps();
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, times), _mm512_mul_ps(low, times));
}
inline __m512i some_halves(const uint16_t* from, int64_t n) {
    const __m512i halves = some(from, n);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)),
                                        _mm512_cvtph_ps(_mm512_castsi512_si256(halves)));
}

// Sixteen rows of sixteen pairs → sixteen rows, the pairs' columns.
inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

// Two rows of 32 → the pairs of the first sixteen columns, and of the others.
inline void interleave(__m512i first, __m512i second, uint16_t* low, uint16_t* high) {
    alignas(64) static constexpr uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i lower = _mm512_load_si512(LOW), upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    _mm512_store_si512(low, _mm512_permutex2var_epi16(first, lower, second));
    _mm512_store_si512(high, _mm512_permutex2var_epi16(first, upper, second));
}

// Rows 0..rows of a matrix, at most 32, as they lie: the tiles of ``columns``, at ``to`` for each 32 of these a PAIR.
inline void row_block(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* to) {
    for (int64_t row = 0; row < BLOCK; ++row) {
        uint16_t* tile = to + row / 16 * TILE + row % 16 * 32;
        const uint16_t* x = from + row * stride;
        for (int64_t c = 0; c < columns; c += 32, tile += PAIR)
            _mm512_store_si512(tile, row < rows ? some(x + c, columns - c) : _mm512_setzero_si512());
    }
}

// A panel's half from rows that are its columns: ``at(row, column)`` gives 32 numbers of row 0..rows, at most sixteen.
template <class At>
inline void half_of_rows(int64_t rows, int64_t columns, const At& at, uint16_t* to, int64_t step) {
    for (int64_t c = 0; c < columns; c += 32, to += step) {
        __m512i pairs[16];
        for (int64_t row = 0; row < 16; ++row) pairs[row] = row < rows ? at(row, c) : _mm512_setzero_si512();
        transpose(pairs);
        for (int64_t k = 0; k < 16; ++k) _mm512_store_si512(to + k * 32, pairs[k]);
    }
}

// A panel from rows that are its own: ``at(row)`` gives 32 numbers of row 0..rows.
template <class At>
inline void panel_of_rows(int64_t rows, const At& at, uint16_t* to) {
    for (int64_t row = 0; row < blocks_of(rows) * BLOCK; row += 2) {
        const __m512i first = row < rows ? at(row) : _mm512_setzero_si512();
        const __m512i second = row + 1 < rows ? at(row + 1) : _mm512_setzero_si512();
        uint16_t* pair = to + row / BLOCK * PAIR + row % BLOCK / 2 * 32;
        interleave(first, second, pair, pair + TILE);
    }
}

}  // namespace
}  // namespace veneer
