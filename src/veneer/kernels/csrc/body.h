// The loops over blocks, rows and threads, written once. A variant includes this file after it has defined, in the same
// unnamed namespace (so that each keeps its own copy):
//
//   Levels                         the boundaries arranged for its search
//   float largest(x, n)            the largest |x|; a NaN or infinity gives a value that is not finite
//   void encode(x, n, reciprocal, levels, order, codes)    n elements, from a byte's beginning; an odd tail is padded
//   Lookup(table, scale)           the 16 products of table and scale
//   void expand(codes, n, lookup, out)                     n elements, from a byte's beginning, fp32 or bf16
//   Sums<M>                        M running sums: add(codes, bytes, lookup, tokens, parity, at), total(token)
//   Levels8(levels)                16 values of 8 bits arranged for its lookup
//   Sums8<M>                       M running sums: add(codes, groups, levels, x, at, scales) with a scale for each group,
//                                  add_blocks(codes, blocks, levels, x, scales) of a row in blocks of two groups,
//                                  add_bytes(even, odd, groups, x) of codes in 8 bits; total(token)

namespace veneer {
namespace {

constexpr int64_t SMALL = 1 << 14;  // elements for which waking other threads costs more than they bring

inline float scale_of(const Scales& s, int64_t block) {
    if (s.values) return s.values[block];
    return s.table[s.codes[block]] * s.nested[block >> s.nested_shift] + *s.offset;  // two roundings: never contracted
}

// 1 / absmax, which is taken to be 1e-38 at least, as bitsandbytes does: the reciprocal is finite.
inline float reciprocal_of(float absmax) {
    return 1.0f / (absmax > 1e-38f ? absmax : 1e-38f);
}

// One element's interval: how many boundaries lie below it, so that a tie goes to the lower one.
inline int interval(float value, const float* boundaries) {
    int found = 0;
    for (int step = 8; step; step /= 2)
        if (value > boundaries[found + step - 1]) found += step;
    return found;
}

inline uint16_t rounded_to_bf16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline int code_at(const uint8_t* codes, int64_t element) {
    return element & 1 ? codes[element / 2] & 15 : codes[element / 2] >> 4;
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

// A number of tokens as a type, so that a loop over them is unrolled.
template <int M>
struct Count {
    static constexpr int value = M;
};

template <class Work>
void for_tokens(int count, const Work& work) {
    switch (count) {
        case 1: return work(Count<1>());
        case 2: return work(Count<2>());
        case 3: return work(Count<3>());
        case 4: return work(Count<4>());
        case 5: return work(Count<5>());
        case 6: return work(Count<6>());
        case 7: return work(Count<7>());
        case 8: return work(Count<8>());
    }
}

void quantise(const Quantise& q, int threads) {
    const Levels levels(q.boundaries);
    const int64_t blocks = (q.count + q.block - 1) / q.block;
#pragma omp parallel for num_threads(threads) schedule(static) if (q.count > SMALL)
    for (int64_t b = 0; b < blocks; ++b) {
        const float* x = q.source + b * q.block;
        const int64_t n = least(q.block, q.count - b * q.block);
        const float absmax = largest(x, n);
        q.absmax[b] = absmax;
        // No clamp to [-1, 1]: a product that rounding carries past the ends lies beyond the last boundary all the same.
        encode(x, n, reciprocal_of(absmax), levels, q, q.codes + b * (q.block / 2));
    }
}

void nearest(const float* values, int64_t count, const float* boundaries, uint8_t* found, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > SMALL)
    for (int64_t i = 0; i < count; ++i) {
        int below = 0;
        for (int step = 128; step; step /= 2) below += values[i] > boundaries[below + step - 1] ? step : 0;
        found[i] = static_cast<uint8_t>(below);
    }
}

// The elements [start, stop) that lie in block b.
template <class Out>
inline void dequantise_block(const Packed& w, int64_t b, int64_t start, int64_t stop, Out* out) {
    int64_t from = greatest(start, b * w.block);
    const int64_t to = least(stop, (b + 1) * w.block);
    if (from >= to) return;
    const Lookup<Out> lookup(w.table, scale_of(w.scales, b));
    if (from & 1) {  // a panel may begin in the middle of a byte
        out[from - start] = lookup.one(code_at(w.codes, from));
        ++from;
    }
    if (from < to) expand(w.codes + from / 2, to - from, lookup, out + (from - start));
}

template <class Out>
void dequantise_to(const Packed& w, int64_t start, int64_t stop, Out* out, int threads) {
    const int64_t first = start / w.block, last = (stop + w.block - 1) / w.block;
#pragma omp parallel for num_threads(threads) schedule(static) if (stop - start > SMALL)
    for (int64_t b = first; b < last; ++b) dequantise_block(w, b, start, stop, out);
}

void dequantise_part(const Packed& w, const Piece& piece, uint16_t* out) {
    for (int64_t row = piece.first_row; row < piece.last_row; ++row, out += piece.last - piece.first) {
        const int64_t start = row * piece.columns + piece.first, stop = row * piece.columns + piece.last;
        for (int64_t b = start / w.block; b * w.block < stop; ++b) dequantise_block(w, b, start, stop, out);
    }
}

void dequantise(const Packed& w, int64_t start, int64_t stop, float* out, int threads) {
    dequantise_to(w, start, stop, out, threads);
}

void dequantise_bf16(const Packed& w, int64_t start, int64_t stop, uint16_t* out, int threads) {
    dequantise_to(w, start, stop, out, threads);
}

template <int M>
void product_of(const Packed& w, const Tokens& x, const Rows& rows, float* out) {
    for (int64_t row = rows.first; row < rows.last; ++row) {
        const int64_t start = row * x.columns, end = start + x.columns;
        const int parity = static_cast<int>(start & 1);
        Sums<M> sums;
        float edges[M] = {};  // the elements that share their byte with another row
        int64_t from = start, b = start / w.block;
        while (from < end) {
            const int64_t to = least(end, (b + 1) * w.block);
            const Lookup<float> lookup(w.table, scale_of(w.scales, b));
            if (from & 1) {
                for (int m = 0; m < M; ++m) edges[m] += lookup.one(code_at(w.codes, from)) * x.x[m * x.columns];
                ++from;
            }
            const int64_t bytes = (to - from) / 2;
            if (bytes > 0) sums.add(w.codes + from / 2, bytes, lookup, x, parity, (from - start) / 2);
            if ((to - from) & 1)
                for (int m = 0; m < M; ++m)
                    edges[m] += lookup.one(code_at(w.codes, to - 1)) * x.x[m * x.columns + x.columns - 1];
            from = to;
            ++b;
        }
        for (int m = 0; m < M; ++m) out[m * rows.all + row] = static_cast<float>(sums.total(m) + edges[m]);
    }
}

void product(const Packed& w, const Tokens& x, const Rows& rows, float* out) {
    for_tokens(x.count, [&](auto count) { product_of<decltype(count)::value>(w, x, rows, out); });
}

// To the nearest integer, a tie to the even one, of |value| < 2^22: what lies below 1 is lost beside the constant.
inline float rounded(float value) {
    return (value + 12582912.0f) - 12582912.0f;
}

// One row of x in groups of 32: scale = absmax / 127, taken to be 1e-35 at least so that both ways to it stay finite.
// Every loop is one that a compiler makes vectors of: of a small weight this is a good part of the product's time.
void round_one(const Bytes& x, int token) {
    const float* from = x.x + token * x.columns;
    int8_t *even = x.lanes + 2 * token * x.stride, *odd = even + x.stride;
    int32_t* corrections = x.corrections + token * (x.stride / 4);
    float *scales = x.scales + token * (x.columns / GROUP), *lanes = x.scale_lanes + token * (x.stride / 4);
    for (int64_t i = 0; i < x.columns; i += GROUP) {
        const float found = largest(from + i, GROUP), absmax = found > 1e-35f ? found : 1e-35f;
        const bool finite = found <= 3.4028234663852886e38f;
        // A group that is not finite is zeros, and its scale carries on that it was not.
        const float scale = finite ? absmax / 127.0f : __builtin_nanf(""), reciprocal = 127.0f / absmax;
        scales[i / GROUP] = scale;
        for (int64_t k = 0; k < GROUP / 8; ++k) lanes[i / 8 + k] = scale;
        int8_t in_order[GROUP] = {};
        if (finite)
            for (int k = 0; k < GROUP; ++k)
                in_order[k] = static_cast<int8_t>(static_cast<int32_t>(rounded(from[i + k] * reciprocal)));
        uint16_t pairs[GROUP / 2];  // of bytes, the first in the low half
        __builtin_memcpy(pairs, in_order, sizeof pairs);
        for (int k = 0; k < GROUP / 2; ++k) {
            even[i / 2 + k] = static_cast<int8_t>(pairs[k] & 255);
            odd[i / 2 + k] = static_cast<int8_t>(pairs[k] >> 8);
        }
    }
    for (int64_t i = x.columns / 2; i < x.stride; ++i) even[i] = odd[i] = 0;
    for (int64_t j = x.columns / 8; j < x.stride / 4; ++j) lanes[j] = 0;
    const auto sum_of_four = [](const int8_t* bytes) {
        uint32_t word;
        __builtin_memcpy(&word, bytes, 4);
        const auto top = [](uint32_t shifted) { return static_cast<int32_t>(shifted) >> 24; };
        return top(word << 24) + top(word << 16) + top(word << 8) + top(word);
    };
    for (int64_t j = 0; j < x.stride / 4; ++j)
        corrections[j] = -128 * (sum_of_four(even + 4 * j) + sum_of_four(odd + 4 * j));
}

void round8(const Bytes& x) {
    for (int m = 0; m < x.count; ++m) round_one(x, m);
}

// scale_of each of several blocks.
inline void scales_of(const Scales& s, int64_t first, int64_t count, float* scales) {
    if (s.values) {
        for (int64_t i = 0; i < count; ++i) scales[i] = s.values[first + i];
        return;
    }
    for (int64_t i = 0; i < count; ++i) scales[i] = s.table[s.codes[first + i]];
    for (int64_t i = 0; i < count;) {
        const int64_t of = (first + i) >> s.nested_shift;
        const float nested = s.nested[of], offset = *s.offset;
        for (const int64_t end = least(count, ((of + 1) << s.nested_shift) - first); i < end; ++i)
            scales[i] = scales[i] * nested + offset;
    }
}

// The scale of a group in the weight, which lies within one block, times that in x. A block has k groups, of the first
// one some are skipped.
inline void both_scales(const float* of_block, int64_t k, int64_t skipped, int64_t groups, const float* of_x, float* both) {
    for (int64_t g = 0, end = k - skipped; g < groups; ++of_block, end += k)
        for (; g < least(groups, end); ++g) both[g] = *of_block * of_x[g];
}

constexpr int64_t CHUNK = 1024;  // blocks whose scales are found at once

// Blocks of two groups in whole rows, which nearly every model has: the scales of many rows at once, and those of x as
// they lie in its lanes.
template <int M>
void product_int8_in_blocks(const Packed& w, const Levels8& levels, float step, const Bytes& x, const Rows& rows, float* out) {
    const int64_t blocks = x.columns / w.block, at_once = CHUNK / blocks;
    float scales[CHUNK];
    for (int64_t first = rows.first; first < rows.last; first += at_once) {
        const int64_t last = least(first + at_once, rows.last);
        scales_of(w.scales, first * blocks, (last - first) * blocks, scales);
        for (int64_t row = first; row < last; ++row) {
            Sums8<M> sums;
            sums.add_blocks(w.codes + row * x.columns / 2, blocks, levels, x, scales + (row - first) * blocks);
            for (int m = 0; m < M; ++m) out[m * rows.all + row] = static_cast<float>(sums.total(m) * step);
        }
    }
}

template <int M>
void product_int8_of(const Packed& w, const Levels8& levels, float step, const Bytes& x, const Rows& rows, float* out) {
    constexpr int64_t GROUPS = 128;  // whose scales are found at once
    const int64_t all = x.columns / GROUP;
    for (int64_t row = rows.first; row < rows.last; ++row) {
        const int64_t start = row * x.columns;
        Sums8<M> sums;
        for (int64_t at = 0; at < all; at += GROUPS) {
            const int64_t from = start + at * GROUP, groups = least(GROUPS, all - at);
            const int64_t first = from / w.block, last = (from + groups * GROUP + w.block - 1) / w.block;
            float of_block[GROUPS + 1], both[M][GROUPS];
            scales_of(w.scales, first, last - first, of_block);
            for (int m = 0; m < M; ++m)
                both_scales(of_block, w.block / GROUP, (from - first * w.block) / GROUP, groups, x.scales + m * all + at,
                            both[m]);
            sums.add(w.codes + from / 2, groups, levels, x, at, both);
        }
        for (int m = 0; m < M; ++m) out[m * rows.all + row] = static_cast<float>(sums.total(m) * step);
    }
}

void product_int8(const Packed& w, const int8_t* table, float step, const Bytes& x, const Rows& rows, float* out) {
    const Levels8 levels(table);
    const bool in_blocks = w.block == 2 * GROUP && x.columns % w.block == 0 && x.columns / w.block <= CHUNK;
    for_tokens(x.count, [&](auto count) {
        constexpr int M = decltype(count)::value;
        (in_blocks ? product_int8_in_blocks<M> : product_int8_of<M>)(w, levels, step, x, rows, out);
    });
}

template <int M>
void product_wide_of(const Wide& w, const Bytes& x, const Rows& rows, float* out) {
    for (int64_t row = rows.first; row < rows.last; ++row) {
        const uint8_t* even = w.codes + row * 2 * x.stride;
        Sums8<M> sums;
        sums.add_bytes(even, even + x.stride, x.columns / GROUP, x);
        for (int m = 0; m < M; ++m) out[m * rows.all + row] = static_cast<float>(sums.total(m) * w.scales[row]);
    }
}

void product_wide(const Wide& w, const Bytes& x, const Rows& rows, float* out) {
    for_tokens(x.count, [&](auto count) { product_wide_of<decltype(count)::value>(w, x, rows, out); });
}

}  // namespace
}  // namespace veneer
