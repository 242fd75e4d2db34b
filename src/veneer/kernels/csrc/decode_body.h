// The loops of a decoding step beside the products of weights in codes, written once. Included after passes_body.h,
// within each variant's own unnamed namespace as those are.

namespace veneer {
namespace {

template <int M>
void product_dense_of(const float* weight, const float* x, int64_t columns, const Rows& rows, float* out) {
    const int64_t whole = columns - columns % LANES;
    for (int64_t row = rows.first; row < rows.last; ++row) {
        const float* w = weight + row * columns;
        Lanes sums[M] = {};
        for (int64_t i = 0; i < whole; i += LANES) {
            Lanes of_w;
            load(of_w, w + i);
            for (int m = 0; m < M; ++m) {
                Lanes of_x;
                load(of_x, x + m * columns + i);
                sums[m] += of_w * of_x;
            }
        }
        for (int m = 0; m < M; ++m) {
            float sum = total(sums[m]);
            for (int64_t i = whole; i < columns; ++i) sum += w[i] * x[m * columns + i];
            out[m * rows.all + row] = sum;
        }
    }
}

void product_dense(const float* weight, const float* x, int count, int64_t columns, const Rows& rows, float* out) {
    for_tokens(count, [&](auto m) { product_dense_of<decltype(m)::value>(weight, x, columns, rows, out); });
}

// One head of one token: the softmax's numerator and denominator grow over blocks of keys, and shrink by what the
// largest score has risen (Milakov & Gimelshein, 2018, arXiv:1805.02867).
void attend_one(const float* query, const float* keys, const float* values, int64_t length, int dim, float scaling,
                float* out) {
    constexpr int64_t BLOCK = 64;
    Lanes sums[256 / LANES] = {};
    const int parts = dim / LANES;
    float most = -__builtin_inff(), sum = 0;
    for (int64_t first = 0; first < length; first += BLOCK) {
        const int64_t n = least(BLOCK, length - first);
        float scores[BLOCK];
        float highest = most;
        for (int64_t t = 0; t < n; ++t) {
            const float* key = keys + (first + t) * dim;
            Lanes products = {};
            for (int k = 0; k < parts; ++k) {
                Lanes q, of_key;
                load(q, query + k * LANES);
                load(of_key, key + k * LANES);
                products += q * of_key;
            }
            scores[t] = total(products) * scaling;
            highest = scores[t] > highest ? scores[t] : highest;
        }
        const float shrink = most < highest ? exponential(most - highest) : 1.0f;
        most = highest;
        sum *= shrink;
        for (int k = 0; k < parts; ++k) sums[k] *= shrink;
        for (int64_t t = 0; t < n; ++t) scores[t] = exponential(scores[t] - most);
        for (int64_t t = 0; t < n; ++t) {
            const float* value = values + (first + t) * dim;
            sum += scores[t];
            for (int k = 0; k < parts; ++k) {
                Lanes of_value;
                load(of_value, value + k * LANES);
                sums[k] += of_value * scores[t];
            }
        }
    }
    const float reciprocal = 1.0f / sum;
    for (int k = 0; k < parts; ++k) {
        sums[k] *= reciprocal;
        store(sums[k], out + k * LANES);
    }
}

void attend(const Attention& a, int64_t first, int64_t last) {
    const int64_t shared = a.heads / a.key_heads;
    for (int64_t item = first; item < last; ++item) {
        const int64_t token = item / a.heads, head = item % a.heads;
        const int64_t at = (a.sequences[token] * a.key_heads + head / shared) * a.room * a.dim;
        attend_one(a.queries + item * a.dim, a.keys + at, a.values + at, a.positions[token] + 1, a.dim, a.scaling,
                   a.out + item * a.dim);
    }
}

}  // namespace
}  // namespace veneer
