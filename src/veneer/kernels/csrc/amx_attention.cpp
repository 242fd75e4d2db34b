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

// Of each of a few queries: the largest score so far, and the sum of exponentials relative to it.
struct Seen {
    float largest[QUERIES], sum[QUERIES];
};

// Scores of a query and the keys [0, keys), of which it attends to [first, last), → shares, bf16 in tiles of 32 keys;
// returns the factor for what was summed up before.
inline float share_out(float* scores, int64_t keys, int64_t first, int64_t last, float scaling2, Numbers shares,
                       float& largest, float& sum) {
    const int64_t from = first / 32 * 32, to = up_to(last, 32);
    const __m512i nothing = _mm512_setzero_si512();
    for (int64_t k = 0; k < keys; k += 32)
        if (k < from || k >= to) _mm512_store_si512(shares + k / 32 * TILE, nothing);
    if (first >= last) return 1.0f;
    const auto hide = [scores](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) scores[k] = -__builtin_inff();
    };
    hide(from, first);
    hide(last, to);
    __m512 most = _mm512_set1_ps(largest);
    for (int64_t k = from; k < to; k += 16) most = _mm512_max_ps(most, _mm512_load_ps(scores + k));
    const float before = largest;
    largest = _mm512_reduce_max_ps(most);
    const __m512 by = _mm512_set1_ps(scaling2), less = _mm512_set1_ps(-largest * scaling2);
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int64_t k = from; k < to; k += 32) {
        const __m512 p = power_of_2(_mm512_fmadd_ps(_mm512_load_ps(scores + k), by, less));
        const __m512 q = power_of_2(_mm512_fmadd_ps(_mm512_load_ps(scores + k + 16), by, less));
        even = _mm512_add_ps(even, p);
        odd = _mm512_add_ps(odd, q);
        _mm512_store_si512(shares + k / 32 * TILE, rounded(p, q));
    }
    const float factor = _mm512_cvtss_f32(power_of_2(_mm512_set1_ps((before - largest) * scaling2)));
    sum = sum * factor + _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
    return factor;
}

// The queries [first, last) of the row, last − first ≤ QUERIES, of one head.
void attend_queries(const RowAttention& a, const Room& room, int64_t length, int64_t first, int64_t last, Seen& seen) {
    const int64_t height = (last - first + 15) / 16, dim = a.dim;
    const float scaling2 = a.scaling * LOG2E;
    for (int64_t i = 0; i < QUERIES; ++i) seen.largest[i] = NOTHING, seen.sum[i] = 0.0f;
    const int64_t beyond = a.causal ? last : length;  // keys
    const int64_t begin = a.window > first ? 0 : (first - a.window + 1) / 32 * 32;
    const Operand queries{room.queries, room.wide * TILE, TILE}, shares{room.shares, KEYS / 32 * TILE, TILE};
    for (int64_t key = begin; key < beyond; key += KEYS) {
        const int64_t keys = least(KEYS, up_to(beyond - key, 32));
        multiply(height, keys / 16, queries, {room.keys + key / 16 * room.wide * TILE, room.wide * TILE, TILE},
                 room.wide, false, room.scores, KEYS);
        for (int64_t i = 0; i < last - first; ++i) {
            const int64_t query = first + i;
            const int64_t from = greatest(0, a.window > query ? 0 : query - a.window + 1 - key);
            const int64_t to = least(keys, (a.causal ? query + 1 : length) - key);
            const float factor = share_out(room.scores + i * KEYS, keys, from, to, scaling2,
                                           room.shares + i / 16 * (KEYS / 32) * TILE + i % 16 * 32, seen.largest[i],
                                           seen.sum[i]);
            if (key == begin || factor == 1.0f) continue;
            float* sums = room.sums + i * dim;
            for (int64_t d = 0; d < dim; d += 16)
                _mm512_store_ps(sums + d, _mm512_mul_ps(_mm512_load_ps(sums + d), _mm512_set1_ps(factor)));
        }
        multiply(height, room.narrow, shares, {room.values + key / 32 * room.narrow * TILE, TILE, room.narrow * TILE},
                 keys / 32, key != begin, room.sums, dim);
    }
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
            attend_queries(a, room, length, query, query + count, seen);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t token = first + query + i;
                write(room.sums + i * a.dim, 1.0f / seen.sum[i], a.dim, to.out + (token * a.heads + head) * a.dim);
                to.lse[head * a.tokens + token] = seen.largest[i] * a.scaling + __builtin_logf(seen.sum[i]);
            }
        }
}

}  // namespace veneer
