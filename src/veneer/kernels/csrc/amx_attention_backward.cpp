// The backward pass of a row (Dao, 2023, algorithm 2): the shares recomputed from the logarithms of their sums, a block
// of queries after another over blocks of keys. Scores lie transposed, a row a key: what a query has stands in lanes.
#include "amx_attention.h"
#include "amx_attention_tiles.h"

namespace veneer {
namespace {

constexpr int64_t BLOCK = 128;    // queries, and keys
constexpr int64_t SIDE = 32;      // of the squares that are computed or left out whole
constexpr int64_t SIDES = BLOCK / SIDE;
constexpr float LOG2E = 1.44269504f;

struct Room {
    int64_t padded;
    int wide, narrow;
    // Of the whole row, of its key head.
    Numbers keys, values, keys_transposed;
    float *key_sums, *value_sums;  // (padded, dim)
    // Of a block of queries, of one head.
    Numbers queries, grads;       // right transposed
    Numbers query_pairs, grad_pairs;  // right
    float *lse2, *dots;           // (BLOCK,): lse in powers of 2; the output's gradient · the output
    float* query_sums;            // (dim, BLOCK), transposed
    // Of a block of both.
    Numbers shares, slopes;       // (keys, queries), left
    Numbers slope_pairs;          // right
    float *scores, *share_grads;  // (SIDE, SIDE)
    int64_t bytes;

    Room(const RowAttention& a, int64_t length, void* room)
        : padded(up_to(length, SIDE)), wide((a.dim + 31) / 32), narrow(a.dim / 16) {
        Pieces pieces(room);
        keys = pieces.tiles(padded / 16 * wide);
        values = pieces.tiles(padded / 16 * wide);
        keys_transposed = pieces.tiles(padded / 32 * narrow);
        key_sums = pieces.floats(padded * a.dim);
        value_sums = pieces.floats(padded * a.dim);
        queries = pieces.tiles(BLOCK / 16 * wide);
        grads = pieces.tiles(BLOCK / 16 * wide);
        query_pairs = pieces.tiles(BLOCK / 32 * narrow);
        grad_pairs = pieces.tiles(BLOCK / 32 * narrow);
        lse2 = pieces.floats(BLOCK);
        dots = pieces.floats(BLOCK);
        query_sums = pieces.floats(a.dim * BLOCK);
        shares = pieces.tiles(BLOCK / 16 * SIDES);
        slopes = pieces.tiles(BLOCK / 16 * SIDES);
        slope_pairs = pieces.tiles(BLOCK / 16 * SIDES);
        scores = pieces.floats(SIDE * SIDE);
        share_grads = pieces.floats(SIDE * SIDE);
        bytes = pieces.taken();
    }
};

// Lanes of 16 queries from `query` on that attend to this key.
inline __mmask16 attending(const RowAttention& a, int64_t length, int64_t query, int64_t key) {
    if (key >= length) return 0;
    const int64_t first = a.causal ? greatest(0, key - query) : 0;
    const int64_t last = a.causal ? least(16, key + a.window - query) : 16;
    if (first >= last) return 0;
    return static_cast<__mmask16>((0xffff << first) & (0xffff >> (16 - last)));
}

// A square of scores and of gradients of shares → shares and slopes in tiles. `whole`: everybody attends to all.
template <bool whole>
inline void square(const RowAttention& a, const Room& room, int64_t length, int64_t query, int64_t key,
                   const float* lse2, const float* dots, Numbers shares, Numbers slopes, Numbers slope_pairs) {
    const __m512 by = _mm512_set1_ps(a.scaling * LOG2E);
    const __m512 lse[2] = {_mm512_load_ps(lse2), _mm512_load_ps(lse2 + 16)};
    const __m512 dot[2] = {_mm512_load_ps(dots), _mm512_load_ps(dots + 16)};
    __m512i above = _mm512_setzero_si512();
    for (int64_t i = 0; i < SIDE; ++i) {
        __m512 share[2], slope[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const int64_t at = i * SIDE + 16 * half;
            const __m512 power = _mm512_fmsub_ps(_mm512_load_ps(room.scores + at), by, lse[half]);
            share[half] = power_of_2(power);
            const __m512 grad = _mm512_sub_ps(_mm512_load_ps(room.share_grads + at), dot[half]);
            if constexpr (whole) {
                slope[half] = _mm512_mul_ps(share[half], grad);
            } else {
                const __mmask16 mask = attending(a, length, query + 16 * half, key + i);
                share[half] = _mm512_maskz_mov_ps(mask, share[half]);
                slope[half] = _mm512_maskz_mul_ps(mask, share[half], grad);
            }
        }
        const int64_t to = i / 16 * SIDES * TILE + i % 16 * 32;
        const __m512i line = rounded(slope[0], slope[1]);
        _mm512_store_si512(shares + to, rounded(share[0], share[1]));
        _mm512_store_si512(slopes + to, line);
        // The columns of these two tiles are queries in another order (`COLUMN`), which costs least.
        if (i % 2) {
            _mm512_store_si512(slope_pairs + i / 2 * 32, _mm512_unpacklo_epi16(above, line));
            _mm512_store_si512(slope_pairs + TILE + i / 2 * 32, _mm512_unpackhi_epi16(above, line));
        }
        above = line;
    }
}

// Which query of 32 a column of two tiles of slope pairs is.
inline int64_t query_of(int64_t column) { return column % 16 / 4 * 8 + column / 16 * 4 + column % 4; }

// Squares of a block, along its queries or its keys.
struct Range {
    int64_t first, last;
};

// Of `count` squares of queries: those of which a query attends to one of the 32 keys that begin `behind` the first query.
inline Range of_queries(const RowAttention& a, int64_t behind, int64_t count) {
    if (!a.causal) return {0, count};
    const int64_t first = greatest(0, behind) / SIDE;
    const int64_t last = up_to(greatest(0, behind + SIDE - 1 + a.window), SIDE) / SIDE;
    return {first, greatest(first, least(count, last))};
}

// Of `count` squares of keys: those that one of the 32 queries which begin `ahead` of the first key attends to.
inline Range of_keys(const RowAttention& a, int64_t ahead, int64_t count) {
    if (!a.causal) return {0, count};
    const int64_t first = greatest(0, ahead - a.window + 1) / SIDE;
    const int64_t last = greatest(0, ahead + SIDE) / SIDE;
    return {first, greatest(first, least(count, last))};
}

// A block of queries and one of keys, `queries` and `keys` squares long.
void attend_block(const RowAttention& a, const Room& room, int64_t length, int64_t query, int64_t queries, int64_t key,
                  int64_t keys) {
    const int64_t wide = room.wide * TILE, narrow = room.narrow * TILE, along_keys = room.padded / 32 * TILE;
    for (int64_t i = 0; i < keys; ++i) {
        const int64_t below = key + SIDE * i;  // the square's first key
        const Range seen = of_queries(a, below - query, queries);
        const int64_t of_key = below / 16 * wide;
        for (int64_t j = seen.first; j < seen.last; ++j) {
            const int64_t at = query + SIDE * j, of_query = 2 * j * wide;
            multiply<2, 2>({room.keys + of_key, wide, TILE}, {room.queries + of_query, wide, TILE}, room.wide, false,
                           room.scores, SIDE);
            multiply<2, 2>({room.values + of_key, wide, TILE}, {room.grads + of_query, wide, TILE}, room.wide, false,
                           room.share_grads, SIDE);
            const bool whole = below + SIDE <= length &&
                               (!a.causal || (below + SIDE - 1 <= at && at + SIDE - 1 - below < a.window));
            const int64_t left = (2 * i * SIDES + j) * TILE;
            (whole ? square<true> : square<false>)(a, room, length, at, below, room.lse2 + SIDE * j,
                                                   room.dots + SIDE * j, room.shares + left, room.slopes + left,
                                                   room.slope_pairs + (i * 2 * SIDES + 2 * j) * TILE);
        }
        if (seen.first == seen.last) continue;
        const int64_t from = (2 * i * SIDES + seen.first) * TILE, depth = seen.last - seen.first;
        multiply(2, room.narrow, {room.shares + from, SIDES * TILE, TILE},
                 {room.grad_pairs + seen.first * narrow, TILE, narrow}, depth, true, room.value_sums + below * a.dim,
                 a.dim);
        multiply(2, room.narrow, {room.slopes + from, SIDES * TILE, TILE},
                 {room.query_pairs + seen.first * narrow, TILE, narrow}, depth, true, room.key_sums + below * a.dim,
                 a.dim);
    }
    for (int64_t j = 0; j < queries; ++j) {
        const Range seen = of_keys(a, query + SIDE * j - key, keys);
        if (seen.first == seen.last) continue;
        multiply(room.narrow, 2, {room.keys_transposed + (key / 32 + seen.first) * TILE, along_keys, TILE},
                 {room.slope_pairs + (seen.first * 2 * SIDES + 2 * j) * TILE, TILE, 2 * SIDES * TILE},
                 seen.last - seen.first, true, room.query_sums + SIDE * j, BLOCK);
    }
}

// What a block of `count` queries needs besides their tiles: `lse` in powers of 2, infinite beyond the end, where shares
// are then 0; and the dot products of outputs and their gradients.
void statistics(const Part& grad, const Part& out, const float* lse, int64_t count, int64_t padded, const Room& room) {
    for (int64_t i = 0; i < padded; ++i) {
        __m512 sum = _mm512_setzero_ps();
        for (int k = 0; k < room.wide; ++k)
            sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(grad.line(i, k)),
                                   reinterpret_cast<__m512bh>(out.line(i, k)));
        room.dots[i] = _mm512_reduce_add_ps(sum);
        room.lse2[i] = i < count ? lse[i] * LOG2E : __builtin_inff();
    }
}

// The queries' gradients of a block: from sums (dim, BLOCK), whose columns are in another order, to rows.
void write_transposed(const RowAttention& a, const Room& room, int64_t count, uint16_t* to) {
    const __m512 scaling = _mm512_set1_ps(a.scaling);
    for (int64_t column = 0; column < up_to(count, SIDE); column += 16)
        for (int d = 0; d < a.dim; d += 16) {
            Rows16 r;
            for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(room.query_sums + (d + i) * BLOCK + column);
            transpose(r);
            for (int i = 0; i < 16; ++i) {
                const int64_t query = column / SIDE * SIDE + query_of(column % SIDE + i);
                const __m512 row = _mm512_mul_ps(_mm512_castsi512_ps(r[i]), scaling);
                if (query < count)
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + query * a.heads * a.dim + d),
                                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(row)));
            }
        }
}

}  // namespace

int64_t attend_row_backward_room(const RowAttention& a, int64_t length) { return Room(a, length, nullptr).bytes; }

void attend_row_backward(const RowAttention& of, int64_t first, int64_t length, int key_head, const AttentionGrads& to,
                         void* at) {
    RowAttention a = of;
    a.window = least(a.window, length);
    const Tiles tiles;
    const Room room(a, length, at);
    const auto part = [&](const Heads& x, int head, int64_t token, int64_t count) {
        return Part{x.data + (first + token) * x.of_token + head * x.of_head, x.of_token, count, a.dim};
    };
    lay_out(part(a.keys, key_head, 0, length), room.padded, room.keys, nullptr);
    lay_out(part(a.values, key_head, 0, length), room.padded, room.values, nullptr);
    lay_out_pairs(part(a.keys, key_head, 0, length), room.padded, nullptr, room.keys_transposed);
    __builtin_memset(room.key_sums, 0, room.padded * a.dim * sizeof(float));
    __builtin_memset(room.value_sums, 0, room.padded * a.dim * sizeof(float));
    const int group = a.heads / a.key_heads;
    for (int head = key_head * group; head < (key_head + 1) * group; ++head)
        for (int64_t query = 0; query < length; query += BLOCK) {
            const int64_t count = least(BLOCK, length - query), padded = up_to(count, SIDE);
            const Part queries = part(a.queries, head, query, count), grads = part(to.grad, head, query, count);
            lay_out(queries, padded, nullptr, room.queries);
            lay_out(grads, padded, nullptr, room.grads);
            lay_out_pairs(queries, padded, room.query_pairs, nullptr);
            lay_out_pairs(grads, padded, room.grad_pairs, nullptr);
            statistics(grads, part(to.out, head, query, count), to.lse + head * a.tokens + first + query, count, padded,
                       room);
            __builtin_memset(room.query_sums, 0, a.dim * BLOCK * sizeof(float));
            const int64_t begin = a.causal ? greatest(0, query - a.window + 1) / SIDE * SIDE : 0;
            const int64_t end = a.causal ? query + padded : room.padded;
            for (int64_t key = begin; key < end; key += BLOCK)
                attend_block(a, room, length, query, padded / SIDE, key, least(BLOCK, end - key) / SIDE);
            write_transposed(a, room, count, to.queries + ((first + query) * a.heads + head) * a.dim);
        }
    for (int64_t i = 0; i < length; ++i) {
        const int64_t place = ((first + i) * a.key_heads + key_head) * a.dim;
        write(room.key_sums + i * a.dim, a.scaling, a.dim, to.keys + place);
        write(room.value_sums + i * a.dim, 1.0f, a.dim, to.values + place);
    }
}

}  // namespace veneer
