// The passes between matrix products, in fp32 and in bf16, forward and backward, written once. Each computes in fp32; T is
// what it reads and writes, and what models round to in between (`rounded_to`), which in fp32 is nothing. Included after
// body.h, within each variant's own unnamed namespace as that is.

namespace veneer {
namespace {

#include "lanes.h"
#include "numbers.h"

// grad · weight of some numbers, rounded as where it is kept in between.
template <class N, class Between, class T>
inline N weighted(const T* grad, const float* weight) {
    return rounded_to<Between>(get<N>(grad) * get<N>(weight));
}

template <class T>
inline float sum_of_squares(const T* x, int64_t width) {
    const int64_t whole = width - width % LANES;
    Lanes sums = {};
    for (int64_t i = 0; i < whole; i += LANES) {
        Lanes of_x;
        load(of_x, x + i);
        sums += of_x * of_x;
    }
    float sum = total(sums);
    for (int64_t i = whole; i < width; ++i) sum += get<float>(x + i) * get<float>(x + i);
    return sum;
}

// The sum over i of grad[i] · weight[i] · x[i].
template <class Between, class T>
inline float sum_of_products(const T* grad, const float* weight, const T* x, int64_t width) {
    const int64_t whole = width - width % LANES;
    Lanes sums = {};
    for (int64_t i = 0; i < whole; i += LANES)
        for (int k = 0; k < Lanes::PARTS; ++k) {
            const int64_t at = i + k * REGISTER;
            sums.parts[k] += weighted<Part, Between>(grad + at, weight + at) * get<Part>(x + at);
        }
    float sum = total(sums);
    for (int64_t i = whole; i < width; ++i) sum += weighted<float, Between>(grad + i, weight + i) * get<float>(x + i);
    return sum;
}

template <class Between, class T>
void normalise_of(const T* x, const float* weight, float eps, int64_t rows, int64_t width, T* out, float* inverses) {
    for (int64_t row = 0; row < rows; ++row, x += width, out += width) {
        const float mean = sum_of_squares(x, width) / static_cast<float>(width);
        const float inverse = 1.0f / __builtin_sqrtf(mean + eps);
        if (inverses) inverses[row] = inverse;
        for_numbers(width, [&](auto kind, int64_t i) {
            using N = decltype(kind);
            put(out + i, get<N>(weight + i) * rounded_to<Between>(get<N>(x + i) * inverse));
        });
    }
}

template <class T>
void normalise(const T* x, const float* weight, float eps, bool once, int64_t rows, int64_t width, T* out,
               float* inverses) {
    (once ? normalise_of<float, T> : normalise_of<T, T>)(x, weight, eps, rows, width, out, inverses);
}

// With n = x · inverse and g = grad · weight:  dx = inverse · (g − n · mean(g · n)).
template <class Between, class T>
void normalise_backward_of(const T* grad, const T* x, const float* inverses, const float* weight, int64_t rows,
                           int64_t width, T* out) {
    for (int64_t row = 0; row < rows; ++row, grad += width, x += width, out += width) {
        const float inverse = inverses[row];
        const float sum = sum_of_products<Between>(grad, weight, x, width);
        const float along = sum / static_cast<float>(width) * inverse * inverse;
        for_numbers(width, [&](auto kind, int64_t i) {
            using N = decltype(kind);
            put(out + i, inverse * (weighted<N, Between>(grad + i, weight + i) - get<N>(x + i) * along));
        });
    }
}

template <class T>
void normalise_backward(const T* grad, const T* x, const float* inverses, const float* weight, bool once, int64_t rows,
                        int64_t width, T* out) {
    const auto of = once ? normalise_backward_of<float, T> : normalise_backward_of<T, T>;
    of(grad, x, inverses, weight, rows, width, out);
}

template <class N>
inline N sigmoid(const N& x) { return 1.0f / (1.0f + exponential(-x)); }

// Both gates are x · σ(z): z = x, and for GELU's approximation by tanh z = 2 √(2/π) (x + 0.044715 x³).
struct Silu {
    template <class N>
    static N inner(const N& x) { return x; }
    template <class N>
    static N inner_slope(const N&) { return same<N>(1.0f); }
};

struct Gelu {
    template <class N>
    static N inner(const N& x) { return 1.5957691216f * (x + 0.044715f * x * x * x); }
    template <class N>
    static N inner_slope(const N& x) { return 1.5957691216f * (1.0f + 0.134145f * x * x); }
};

template <class Gate, class T>
void gate_of(const T* gate, const T* up, int64_t count, T* out) {
    for_numbers(count, [&](auto kind, int64_t i) {
        using N = decltype(kind);
        const N x = get<N>(gate + i);
        put(out + i, rounded_to<T>(x * sigmoid(Gate::inner(x))) * get<N>(up + i));
    });
}

template <class T>
void gate(const T* gate, const T* up, int64_t count, bool gelu, T* out) {
    (gelu ? gate_of<Gelu, T> : gate_of<Silu, T>)(gate, up, count, out);
}

// With σ = σ(z(x)):  d (x σ) = σ · (1 + x · (1 − σ) · z').
template <class Gate, class T>
void gate_backward_of(const T* grad, const T* gate, const T* up, int64_t count, T* grad_gate, T* grad_up) {
    for_numbers(count, [&](auto kind, int64_t i) {
        using N = decltype(kind);
        const N of_product = get<N>(grad + i), x = get<N>(gate + i), s = sigmoid(Gate::inner(x));
        const N of_gate = rounded_to<T>(of_product * get<N>(up + i));
        put(grad_up + i, of_product * rounded_to<T>(x * s));
        put(grad_gate + i, of_gate * (s * (1.0f + x * (1.0f - s) * Gate::inner_slope(x))));
    });
}

template <class T>
void gate_backward(const T* grad, const T* gate, const T* up, int64_t count, bool gelu, T* grad_gate, T* grad_up) {
    (gelu ? gate_backward_of<Gelu, T> : gate_backward_of<Silu, T>)(grad, gate, up, count, grad_gate, grad_up);
}

template <class T>
void rotate(const T* x, int64_t stride, const T* cosines, const T* sines, int heads, int dim, bool transposed, T* out) {
    const int half = dim / 2;
    const T *c0 = cosines, *c1 = cosines + half, *s0 = sines, *s1 = sines + half;
    for (int head = 0; head < heads; ++head, x += stride, out += dim)
        for_numbers(half, [&](auto kind, int64_t i) {
            using N = decltype(kind);
            const N a = get<N>(x + i), b = get<N>(x + i + half);
            const auto times = [](const N& value, const T* by) { return rounded_to<T>(value * get<N>(by)); };
            const N of_a = times(a, c0 + i), of_b = times(b, c1 + i);
            put(out + i, transposed ? of_a + times(b, s1 + i) : of_a - times(b, s0 + i));
            put(out + i + half, transposed ? of_b - times(a, s0 + i) : of_b + times(a, s1 + i));
        });
}

}  // namespace
}  // namespace veneer
