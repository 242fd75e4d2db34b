// The forward pass of a row (Dao, 2023, algorithm 1): 32 queries at a time, over 256 keys at a time.
#include "amx_attention.h"

#include "amx_attention_tiles.h"

namespace veneer {
namespace {

constexpr int64_t QUERIES = 32, KEYS = 256;
constexpr float LOG2E = 1.44269504f, NOTHING = -3e38f;

struct Room {
    int64_t padded;               // the row's tokens
    int wide, narrow;             // tiles of 32 and of 16 dimensions
    Numbers keys, values, queries, shares;
    float *scores, *sums;         // (QUERIES, KEYS), (QUERIES, dim)
    int64_t bytes;

    Room(const RowAttention& a, int64_t length, void* room)
        : padded(up_to(length, 32)), wide((a.dim + 31) / 32), narrow(a.dim / 16) {
        Pieces pieces(room);
        keys = pieces.tiles(padded / 16 * wide);
        values = pieces.tiles(padded / 32 * narrow);
        queries = pieces.tiles(QUERIES / 16 * wide);
        shares = pieces.tiles(QUERIES / 16 * (KEYS / 32));
        scores = pieces.floats(QUERIES * KEYS);
        sums = pieces.floats(QUERIES * a.dim);
        bytes = pieces.taken();
    }
};

// Of each query of a block: its largest score so far, the factor for what was summed up before, and the sum of
// exponentials relative to the largest, in parts.
struct Seen {
    alignas(64) float largest[QUERIES], factor[QUERIES], sums[QUERIES][16], parts[QUERIES][16];
};

// Those of 16 keys, from `key` on, that lie in [first, last).
inline __mmask16 within(int64_t first, int64_t last, int64_t key) {
    const int64_t begin = least(16, greatest(0, first - key)), end = least(16, greatest(0, last - key));
    return static_cast<__mmask16>((0xffff << begin) & (0xffff >> (16 - end)));
}

// The keys of a chunk that a query attends to, of those it was computed for.
struct Keys {
    int64_t first, last;
};

inline Keys keys_of(const RowAttention& a, int64_t length, int64_t query, int64_t chunk, int64_t keys) {
    const int64_t first = a.window > query ? 0 : query - a.window + 1;
    return {greatest(0, first - chunk), least(keys, (a.causal ? query + 1 : length) - chunk)};
}

// The largest of a query's scores, in 16 parts.
inline __m512 largest_of(const float* scores, Keys keys) {
    __m512 most = _mm512_set1_ps(NOTHING);
    for (int64_t k = keys.first / 16 * 16; k < keys.last; k += 16) {
        const __m512 x = _mm512_load_ps(scores + k);
        most = k >= keys.first && k + 16 <= keys.last
                   ? _mm512_max_ps(most, x)
                   : _mm512_mask_max_ps(most, within(keys.first, keys.last, k), most, x);
    }
    return most;
}

// exp2(scores · by + less), of the keys that it attends to, else 0 → shares, bf16 in tiles of 32 of all `count` keys.
// Returns their sum, in 16 parts.
inline __m512 share_out(const float* scores, int64_t count, Keys keys, __m512 by, __m512 less, Numbers shares) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int64_t k = 0; k < count; k += 32) {
        __m512 p = _mm512_setzero_ps(), q = p;
        if (k + 32 > keys.first && k < keys.last) {
            p = power_of_2(_mm512_fmadd_ps(_mm512_load_ps(scores + k), by, less));
            q = power_of_2(_mm512_fmadd_ps(_mm512_load_ps(scores + k + 16), by, less));
            if (k < keys.first || k + 32 > keys.last) {
                p = _mm512_maskz_mov_ps(within(keys.first, keys.last, k), p);
                q = _mm512_maskz_mov_ps(within(keys.first, keys.last, k + 16), q);
            }
            even = _mm512_add_ps(even, p);
            odd = _mm512_add_ps(odd, q);
        }
        _mm512_store_si512(shares + k / 32 * TILE, rounded(p, q));
    }
    return _mm512_add_ps(even, odd);
}

// What 16 rows of 16 parts come to.
template <class Combine>
inline __m512 together(const float (*parts)[16], const Combine& combine) {
    Rows16 r;
    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(parts[i]);
    transpose(r);
    __m512 all = _mm512_castsi512_ps(r[0]);
    for (int i = 1; i < 16; ++i) all = combine(all, _mm512_castsi512_ps(r[i]));
    return all;
}

// The scores of a chunk of `keys` keys → shares and what was seen; sums of values before are brought to the new largest.
inline void share_out_chunk(const RowAttention& a, const Room& room, int64_t length, int64_t first, int64_t queries,
                            int64_t chunk, int64_t keys, bool begins, Seen& seen) {
    const __m512 by = _mm512_set1_ps(a.scaling * LOG2E);
    for (int64_t i = 0; i < queries; ++i)
        _mm512_store_ps(seen.parts[i], largest_of(room.scores + i * KEYS, keys_of(a, length, first + i, chunk, keys)));
    for (int64_t i = 0; i < queries; i += 16) {
        const __m512 before = _mm512_load_ps(seen.largest + i);
        const __m512 largest = _mm512_max_ps(
            before, together(seen.parts + i, [](__m512 x, __m512 y) { return _mm512_max_ps(x, y); }));
        _mm512_store_ps(seen.largest + i, largest);
        _mm512_store_ps(seen.factor + i, power_of_2(_mm512_mul_ps(_mm512_sub_ps(before, largest), by)));
    }
    for (int64_t i = 0; i < queries; ++i) {
        const __m512 less = _mm512_mul_ps(_mm512_set1_ps(-seen.largest[i]), by);
        const __m512 sum = share_out(room.scores + i * KEYS, keys, keys_of(a, length, first + i, chunk, keys), by, less,
                                     room.shares + i / 16 * (KEYS / 32) * TILE + i % 16 * 32);
        const __m512 factor = _mm512_set1_ps(seen.factor[i]);
        _mm512_store_ps(seen.sums[i], _mm512_fmadd_ps(_mm512_load_ps(seen.sums[i]), factor, sum));
        if (begins || seen.factor[i] == 1.0f) continue;
        float* sums = room.sums + i * a.dim;
        for (int64_t d = 0; d < a.dim; d += 16)
            _mm512_store_ps(sums + d, _mm512_mul_ps(_mm512_load_ps(sums + d), factor));
    }
}

// `count` queries of the row from `first` on, at most QUERIES, of one head, which lie in tiles.
void attend_queries(const RowAttention& a, const Room& room, int64_t length, int64_t first, int64_t count, Seen& seen) {
    const int64_t height = (count + 15) / 16, wide = room.wide * TILE, narrow = room.narrow * TILE;
    const int64_t beyond = a.causal ? first + count : length;  // keys
    const int64_t begin = a.window > first ? 0 : (first - a.window + 1) / 32 * 32;
    for (int64_t i = 0; i < QUERIES; ++i) {
        seen.largest[i] = NOTHING;
        _mm512_store_ps(seen.sums[i], _mm512_setzero_ps());
    }
    for (int64_t chunk = begin; chunk < beyond; chunk += KEYS) {
        const int64_t keys = least(KEYS, up_to(beyond - chunk, 32));
        multiply(height, keys / 16, {room.queries, wide, TILE}, {room.keys + chunk / 16 * wide, wide, TILE}, room.wide,
                 false, room.scores, KEYS);
        share_out_chunk(a, room, length, first, 16 * height, chunk, keys, chunk == begin, seen);
        multiply(height, room.narrow, {room.shares, KEYS / 32 * TILE, TILE},
                 {room.values + chunk / 32 * narrow, TILE, narrow}, keys / 32, chunk != begin, room.sums, a.dim);
    }
}

// log2 of a number above 0: a cubic for the mantissa's, and a step of Newton's from there.
inline __m512 log2(__m512 x) {
    const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
    const __m512 e = _mm512_getexp_ps(_mm512_div_ps(x, m));
    __m512 y = _mm512_set1_ps(0.37510806f);
    y = _mm512_fmadd_ps(y, m, _mm512_set1_ps(-1.8700002f));
    y = _mm512_fmadd_ps(y, m, _mm512_set1_ps(4.0638463f));
    y = _mm512_fmadd_ps(y, m, _mm512_set1_ps(-2.5686584f));
    const __m512 off = _mm512_fmsub_ps(m, power_of_2(_mm512_sub_ps(_mm512_setzero_ps(), y)), _mm512_set1_ps(1.0f));
    return _mm512_add_ps(e, _mm512_fmadd_ps(off, _mm512_set1_ps(LOG2E), y));
}

}  // namespace

int64_t attend_row_room(const RowAttention& a, int64_t length) { return Room(a, length, nullptr).bytes; }

void attend_row(const RowAttention& a, int64_t first, int64_t length, int key_head, const AttentionOut& to, void* at) {
    const Tiles tiles;
    const Room room(a, length, at);
    const auto part = [&](const Heads& x, int head, int64_t token, int64_t count) {
        return Part{x.data + (first + token) * x.of_token + head * x.of_head, x.of_token, count, a.dim};
    };
    lay_out(part(a.keys, key_head, 0, length), room.padded, nullptr, room.keys);
    lay_out_pairs(part(a.values, key_head, 0, length), room.padded, room.values, nullptr);
    const int group = a.heads / a.key_heads;
    for (int head = key_head * group; head < (key_head + 1) * group; ++head)
        for (int64_t query = 0; query < length; query += QUERIES) {
            const int64_t count = least(QUERIES, length - query);
            Seen seen;
            lay_out(part(a.queries, head, query, count), up_to(count, 16), room.queries, nullptr);
            attend_queries(a, room, length, query, count, seen);
            const int64_t token = first + query;
            for (int64_t i = 0; i < count; i += 16) {
                const __m512 sum = together(seen.sums + i, [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); });
                const __m512 largest = _mm512_mul_ps(_mm512_load_ps(seen.largest + i), _mm512_set1_ps(a.scaling));
                _mm512_mask_storeu_ps(to.lse + head * a.tokens + token + i, within(0, count, i),
                                      _mm512_fmadd_ps(log2(sum), _mm512_set1_ps(1.0f / LOG2E), largest));
                _mm512_store_ps(seen.factor + i, _mm512_div_ps(_mm512_set1_ps(1.0f), sum));
            }
            for (int64_t i = 0; i < count; ++i)
                write(room.sums + i * a.dim, seen.factor[i], a.dim, to.out + ((token + i) * a.heads + head) * a.dim);
        }
}

}  // namespace veneer
