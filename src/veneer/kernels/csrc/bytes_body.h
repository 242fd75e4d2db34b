// The loops over a weight of int8 storage, written once. Included after passes_body.h, within each variant's own unnamed
// namespace as that is; the compiler makes vectors of them for each machine.

namespace veneer {
namespace {

void quantise8(const Quantise& q, int threads) {
    constexpr int LAST = 254;  // code; its interval and the first one have no end
    float ends[LAST + 2];      // code k's interval is ends[k] < x ≤ ends[k + 1]
    ends[0] = -__builtin_inff();
    ends[LAST + 1] = __builtin_inff();
    __builtin_memcpy(ends + 1, q.boundaries, LAST * sizeof(float));
    const int64_t blocks = (q.count + q.block - 1) / q.block;
#pragma omp parallel for num_threads(threads) schedule(static) if (q.count > SMALL)
    for (int64_t b = 0; b < blocks; ++b) {
        const float* x = q.source + b * q.block;
        uint8_t* codes = q.codes + b * q.block;
        const int64_t n = least(q.block, q.count - b * q.block);
        const float absmax = largest(x, n), reciprocal = reciprocal_of(absmax);
        q.absmax[b] = absmax;
        for (int64_t i = 0; i < n; ++i) {
            const float scaled = x[i] * reciprocal;
            float guess = rounded(scaled * 127.0f) + 127.0f;  // one beside the code at most: the intervals decide
            guess = guess > 0.0f ? guess : 0.0f;              // a NaN, too
            guess = guess < LAST ? guess : LAST;
            const int k = static_cast<int>(guess);
            codes[i] = static_cast<uint8_t>(k + (scaled > ends[k + 1]) - !(scaled > ends[k]));
        }
    }
}

inline void round_to(float value, float& to) { to = value; }
inline void round_to(float value, uint16_t& to) { to = rounded_to_bf16(value); }

template <class Out>
inline void dequantise8_block(const Packed& w, int64_t b, int64_t start, int64_t stop, Out* out) {
    const int64_t from = greatest(start, b * w.block), n = least(stop, (b + 1) * w.block) - from;
    const float scale = scale_of(w.scales, b);
    const uint8_t* codes = w.codes + from;
    Out* to = out + (from - start);
    for (int64_t i = 0; i < n; ++i) round_to(static_cast<float>(codes[i] - 127) / 127.0f * scale, to[i]);
}

template <class Out>
void dequantise8_to(const Packed& w, int64_t start, int64_t stop, Out* out, int threads) {
    const int64_t first = start / w.block, last = (stop + w.block - 1) / w.block;
#pragma omp parallel for num_threads(threads) schedule(static) if (stop - start > SMALL)
    for (int64_t b = first; b < last; ++b) dequantise8_block(w, b, start, stop, out);
}

void dequantise8_part(const Packed& w, const Piece& piece, uint16_t* out) {
    for (int64_t row = piece.first_row; row < piece.last_row; ++row, out += piece.last - piece.first) {
        const int64_t start = row * piece.columns + piece.first, stop = row * piece.columns + piece.last;
        for (int64_t b = start / w.block; b * w.block < stop; ++b) dequantise8_block(w, b, start, stop, out);
    }
}

void dequantise8(const Packed& w, int64_t start, int64_t stop, float* out, int threads) {
    dequantise8_to(w, start, stop, out, threads);
}

void dequantise8_bf16(const Packed& w, int64_t start, int64_t stop, uint16_t* out, int threads) {
    dequantise8_to(w, start, stop, out, threads);
}

// Integers times x, summed within a block; its scale multiplies the sums, and what 1 stands for the whole row's.
template <int M>
void product8_of(const Packed& w, const float* x, int64_t columns, const Rows& rows, float* out) {
    constexpr int64_t AT_ONCE = 256;
    float integers[AT_ONCE];  // made in a loop of their own: beside the products GCC would make them one at a time
    for (int64_t row = rows.first; row < rows.last; ++row) {
        Lanes sums[M] = {};
        float rests[M] = {};
        for (int64_t from = 0; from < columns;) {
            const int64_t at = row * columns + from, b = at / w.block;
            const int64_t n = least(least(AT_ONCE, columns - from), (b + 1) * w.block - at), whole = n - n % LANES;
            const float scale = scale_of(w.scales, b);
            for (int64_t i = 0; i < n; ++i) integers[i] = static_cast<float>(w.codes[at + i] - 127);
            for (int m = 0; m < M; ++m) {
                const float* of_x = x + m * columns + from;
                Lanes products = {};
                for (int64_t i = 0; i < whole; i += LANES) {
                    Lanes of_w, token;
                    load(of_w, integers + i);
                    load(token, of_x + i);
                    products += of_w * token;
                }
                sums[m] += products * scale;
                for (int64_t i = whole; i < n; ++i) rests[m] += integers[i] * of_x[i] * scale;
            }
            from += n;
        }
        for (int m = 0; m < M; ++m) out[m * rows.all + row] = (total(sums[m]) + rests[m]) / 127.0f;
    }
}

void product8(const Packed& w, const float* x, int count, int64_t columns, const Rows& rows, float* out) {
    for_tokens(count, [&](auto m) { product8_of<decltype(m)::value>(w, x, columns, rows, out); });
}

}  // namespace
}  // namespace veneer
