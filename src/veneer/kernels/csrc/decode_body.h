// The loops of a decoding step beside the products of weights in codes, written once. Included after body.h, within each
// variant's own unnamed namespace as that is; the compiler makes vectors of the lanes for each machine.

namespace veneer {
namespace {

constexpr int LANES = 16;
typedef float Lanes __attribute__((vector_size(4 * LANES)));

inline void load(Lanes& to, const float* from) { __builtin_memcpy(&to, from, sizeof to); }

inline float total(const Lanes& lanes) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += lanes[i];
    return sum;
}

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

// eˣ = 2ⁿ · e^r with |r| ≤ ln 2 / 2, by the polynomial of Cephes' expf, within 2 units in the last place where the result
// is a normal number; below, it stays at the smallest. Without a branch, so that a loop of it becomes vectors.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float n = rounded(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    return p * power;
}

void normalise(const float* x, const float* weight, float eps, int64_t rows, int64_t width, float* out) {
    const int64_t whole = width - width % LANES;
    for (int64_t row = 0; row < rows; ++row, x += width, out += width) {
        Lanes squares = {};
        for (int64_t i = 0; i < whole; i += LANES) {
            Lanes part;
            load(part, x + i);
            squares += part * part;
        }
        float sum = total(squares);
        for (int64_t i = whole; i < width; ++i) sum += x[i] * x[i];
        const float inverse = 1.0f / __builtin_sqrtf(sum / static_cast<float>(width) + eps);
        for (int64_t i = 0; i < width; ++i) out[i] = weight[i] * (x[i] * inverse);
    }
}

void gate(float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
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
        __builtin_memcpy(out + k * LANES, &sums[k], sizeof sums[k]);
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
