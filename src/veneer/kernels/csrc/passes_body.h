// The passes between matrix products, in fp32, forward and backward, written once. Included after body.h, within each
// variant's own unnamed namespace as that is; the compiler makes vectors of the lanes and loops for each machine.

namespace veneer {
namespace {

#include "lanes.h"

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

// The sum over i of a[i] · b[i] · c[i], c left out where it is null.
inline float sum_of_products(const float* a, const float* b, const float* c, int64_t width) {
    const int64_t whole = width - width % LANES;
    Lanes sums = {};
    for (int64_t i = 0; i < whole; i += LANES) {
        Lanes x, y;
        load(x, a + i);
        load(y, b + i);
        x *= y;
        if (c) {
            load(y, c + i);
            x *= y;
        }
        sums += x;
    }
    float sum = total(sums);
    for (int64_t i = whole; i < width; ++i) sum += a[i] * b[i] * (c ? c[i] : 1.0f);
    return sum;
}

void normalise(const float* x, const float* weight, float eps, int64_t rows, int64_t width, float* out, float* inverses) {
    for (int64_t row = 0; row < rows; ++row, x += width, out += width) {
        const float mean = sum_of_products(x, x, nullptr, width) / static_cast<float>(width);
        const float inverse = 1.0f / __builtin_sqrtf(mean + eps);
        if (inverses) inverses[row] = inverse;
        for (int64_t i = 0; i < width; ++i) out[i] = weight[i] * (x[i] * inverse);
    }
}

// With n = x · inverse and g = grad · weight:  dx = inverse · (g − n · mean(g · n)).
void normalise_backward(const float* grad, const float* x, const float* inverses, const float* weight, int64_t rows,
                        int64_t width, float* out) {
    for (int64_t row = 0; row < rows; ++row, grad += width, x += width, out += width) {
        const float inverse = inverses[row];
        const float along = sum_of_products(grad, weight, x, width) / static_cast<float>(width) * inverse * inverse;
        for (int64_t i = 0; i < width; ++i) out[i] = inverse * (grad[i] * weight[i] - x[i] * along);
    }
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Both gates are x · σ(z): z = x, and for GELU's approximation by tanh z = 2 √(2/π) (x + 0.044715 x³).
struct Silu {
    static float inner(float x) { return x; }
    static float inner_slope(float) { return 1.0f; }
};

struct Gelu {
    static float inner(float x) { return 1.5957691216f * (x + 0.044715f * x * x * x); }
    static float inner_slope(float x) { return 1.5957691216f * (1.0f + 0.134145f * x * x); }
};

template <class Gate>
void gate_of(const float* gate, const float* up, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = gate[i] * sigmoid(Gate::inner(gate[i])) * up[i];
}

void gate(const float* gate, const float* up, int64_t count, bool gelu, float* out) {
    (gelu ? gate_of<Gelu> : gate_of<Silu>)(gate, up, count, out);
}

// With σ = σ(z(x)):  d (x σ) = σ · (1 + x · (1 − σ) · z').
template <class Gate>
void gate_backward_of(const float* grad, const float* gate, const float* up, int64_t count, float* grad_gate,
                      float* grad_up) {
    for (int64_t i = 0; i < count; ++i) {
        const float x = gate[i], s = sigmoid(Gate::inner(x));
        grad_up[i] = grad[i] * (x * s);
        grad_gate[i] = grad[i] * up[i] * (s * (1.0f + x * (1.0f - s) * Gate::inner_slope(x)));
    }
}

void gate_backward(const float* grad, const float* gate, const float* up, int64_t count, bool gelu, float* grad_gate,
                   float* grad_up) {
    (gelu ? gate_backward_of<Gelu> : gate_backward_of<Silu>)(grad, gate, up, count, grad_gate, grad_up);
}

void rotate(const float* x, int64_t stride, const float* cosines, const float* sines, int heads, int dim, bool transposed,
            float* out) {
    const int half = dim / 2;
    for (int head = 0; head < heads; ++head, x += stride, out += dim) {
        const float *c0 = cosines, *c1 = cosines + half, *s0 = sines, *s1 = sines + half;
        for (int i = 0; i < half; ++i) {
            const float a = x[i], b = x[i + half];
            out[i] = transposed ? a * c0[i] + b * s1[i] : a * c0[i] - b * s0[i];
            out[i + half] = transposed ? b * c1[i] - a * s0[i] : b * c1[i] + a * s1[i];
        }
    }
}

}  // namespace
}  // namespace veneer
