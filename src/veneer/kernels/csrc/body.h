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
//   Sums8<M>                       M running sums: add(codes, groups, levels, x, at, scales), total(token)

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

template <class Out>
void dequantise_to(const Packed& w, int64_t start, int64_t stop, Out* out, int threads) {
    const int64_t first = start / w.block, last = (stop + w.block - 1) / w.block;
#pragma omp parallel for num_threads(threads) schedule(static) if (stop - start > SMALL)
    for (int64_t b = first; b < last; ++b) {
        int64_t from = greatest(start, b * w.block);
        const int64_t to = least(stop, (b + 1) * w.block);
        const Lookup<Out> lookup(w.table, scale_of(w.scales, b));
        if (from & 1) {  // a panel may begin in the middle of a byte
            out[from - start] = lookup.one(code_at(w.codes, from));
            ++from;
        }
        if (from < to) expand(w.codes + from / 2, to - from, lookup, out + (from - start));
    }
}

void dequantise(const Packed& w, int64_t start, int64_t stop, float* out, int threads) {
    dequantise_to(w, start, stop, out, threads);
}

void dequantise_bf16(const Packed& w, int64_t start, int64_t stop, uint16_t* out, int threads) {
    dequantise_to(w, start, stop, out, threads);
}

template <int M>
void product_of(const Packed& w, const Tokens& x, int64_t rows, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * x.columns > SMALL)
    for (int64_t row = 0; row < rows; ++row) {
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
        for (int m = 0; m < M; ++m) out[m * rows + row] = static_cast<float>(sums.total(m) + edges[m]);
    }
}

void product(const Packed& w, const Tokens& x, int64_t rows, float* out, int threads) {
    switch (x.count) {
        case 1: return product_of<1>(w, x, rows, out, threads);
        case 2: return product_of<2>(w, x, rows, out, threads);
        case 3: return product_of<3>(w, x, rows, out, threads);
        case 4: return product_of<4>(w, x, rows, out, threads);
        case 5: return product_of<5>(w, x, rows, out, threads);
        case 6: return product_of<6>(w, x, rows, out, threads);
        case 7: return product_of<7>(w, x, rows, out, threads);
        case 8: return product_of<8>(w, x, rows, out, threads);
    }
}

// To the nearest integer, a tie to the even one, of |value| < 2^22: what lies below 1 is lost beside the constant.
inline float rounded(float value) {
    return (value + 12582912.0f) - 12582912.0f;
}

// One row of x in groups of 32: scale = absmax / 127, taken to be 1e-35 at least so that both ways to it stay finite.
void activations(const Bytes& x, int token) {
    const float* from = x.x + token * x.columns;
    int8_t *even = x.lanes + 2 * token * x.stride, *odd = even + x.stride;
    int32_t* corrections = x.corrections + token * (x.stride / 4);
    float* scales = x.scales + token * (x.columns / GROUP);
    for (int64_t i = 0; i < x.columns; i += GROUP) {
        const float found = largest(from + i, GROUP), absmax = found > 1e-35f ? found : 1e-35f;
        const bool finite = found <= 3.4028234663852886e38f;
        scales[i / GROUP] = finite ? absmax / 127.0f : __builtin_nanf("");  // which the group's zeros carry on
        const float reciprocal = 127.0f / absmax;
        for (int64_t k = i / 2; k < (i + GROUP) / 2; ++k) {
            even[k] = finite ? static_cast<int8_t>(rounded(from[2 * k] * reciprocal)) : 0;
            odd[k] = finite ? static_cast<int8_t>(rounded(from[2 * k + 1] * reciprocal)) : 0;
        }
        for (int64_t j = i / 8; j < (i + GROUP) / 8; ++j) {
            int sum = 0;
            for (int k = 0; k < 4; ++k) sum += even[4 * j + k] + odd[4 * j + k];
            corrections[j] = -128 * sum;
        }
    }
    for (int64_t i = x.columns / 2; i < x.stride; ++i) even[i] = odd[i] = 0;
    for (int64_t j = x.columns / 8; j < x.stride / 4; ++j) corrections[j] = 0;
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
    if (k == 2 && !skipped && groups % 2 == 0) {  // blocks of 64 in whole rows: what nearly every model has, in vectors
        for (int64_t b = 0; b < groups / 2; ++b) {
            both[2 * b] = of_block[b] * of_x[2 * b];
            both[2 * b + 1] = of_block[b] * of_x[2 * b + 1];
        }
        return;
    }
    for (int64_t g = 0, end = k - skipped; g < groups; ++of_block, end += k)
        for (; g < least(groups, end); ++g) both[g] = *of_block * of_x[g];
}

template <int M>
void product8_of(const Packed& w, const Levels8& levels, float step, const Bytes& x, int64_t rows, float* out,
                 int threads) {
    constexpr int64_t CHUNK = 128;  // groups whose scales are found at once
    const int64_t all = x.columns / GROUP;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * x.columns > SMALL)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t start = row * x.columns;
        Sums8<M> sums;
        for (int64_t at = 0; at < all; at += CHUNK) {
            const int64_t from = start + at * GROUP, groups = least(CHUNK, all - at);
            const int64_t first = from / w.block, last = (from + groups * GROUP + w.block - 1) / w.block;
            float of_block[CHUNK + 1], both[M][CHUNK];
            scales_of(w.scales, first, last - first, of_block);
            for (int m = 0; m < M; ++m)
                both_scales(of_block, w.block / GROUP, (from - first * w.block) / GROUP, groups, x.scales + m * all + at,
                            both[m]);
            sums.add(w.codes + from / 2, groups, levels, x, at, both);
        }
        for (int m = 0; m < M; ++m) out[m * rows + row] = static_cast<float>(sums.total(m) * step);
    }
}

void product8(const Packed& w, const int8_t* table, float step, const Bytes& x, int64_t rows, float* out, int threads) {
    for (int m = 0; m < x.count; ++m) activations(x, m);
    const Levels8 levels(table);
    switch (x.count) {
        case 1: return product8_of<1>(w, levels, step, x, rows, out, threads);
        case 2: return product8_of<2>(w, levels, step, x, rows, out, threads);
        case 3: return product8_of<3>(w, levels, step, x, rows, out, threads);
        case 4: return product8_of<4>(w, levels, step, x, rows, out, threads);
        case 5: return product8_of<5>(w, levels, step, x, rows, out, threads);
        case 6: return product8_of<6>(w, levels, step, x, rows, out, threads);
        case 7: return product8_of<7>(w, levels, step, x, rows, out, threads);
        case 8: return product8_of<8>(w, levels, step, x, rows, out, threads);
    }
}

}  // namespace
}  // namespace veneer
