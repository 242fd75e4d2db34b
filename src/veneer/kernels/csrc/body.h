// The loops over blocks, rows and threads, written once. A variant includes this file after it has defined, in the same
// unnamed namespace (so that each keeps its own copy):
//
//   Levels                         the boundaries arranged for its search
//   float largest(x, n)            the largest |x|; a NaN or infinity gives a value that is not finite
//   void encode(x, n, reciprocal, levels, order, codes)    n elements, from a byte's beginning; an odd tail is padded
//   Lookup(table, scale)           the 16 products of table and scale
//   void expand(codes, n, lookup, out)                     n elements, from a byte's beginning, fp32 or bf16
//   Sums<M>                        M running sums: add(codes, bytes, lookup, tokens, parity, at), total(token)

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

}  // namespace
}  // namespace veneer
