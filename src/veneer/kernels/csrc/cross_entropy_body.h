// Cross-entropies of rows of logits and their gradients, written once. Included after passes_body.h, within each variant's
// own unnamed namespace as that is. A row comes from memory once, and stays in the cache from pass to pass.

namespace veneer {
namespace {

// e^x of x ≤ 0 or NaN; of less than the smallest normal number, as of a logit that is masked by −∞, nothing.
template <class N>
inline N share_of_largest(const N& x) {
    return x < same<N>(-87.0f) ? N{} : exponential_between(x);
}

// The largest of a row, lowest where all are −∞: finite, so that −∞ less it is −∞. A NaN shows in the sums.
template <class T>
inline float largest_of(const T* x, int64_t width) {
    constexpr float LOWEST = -3.4028234663852886e38f;
    constexpr int AT_ONCE = 4;
    Part parts[AT_ONCE];
    for (Part& part : parts) part = same<Part>(LOWEST);
    int64_t i = 0;
    for (; i + AT_ONCE * REGISTER <= width; i += AT_ONCE * REGISTER)
        for (int k = 0; k < AT_ONCE; ++k) parts[k] = larger(get<Part>(x + i + k * REGISTER), parts[k]);
    float largest = LOWEST;
    for (const Part& part : parts)
        for (int k = 0; k < REGISTER; ++k) largest = larger(part[k], largest);
    for (; i < width; ++i) largest = larger(get<float>(x + i), largest);
    return largest;
}

// A sum of many numbers: each lane adds up some in fp32, and these sums are added in fp64.
template <class Of>
inline double sum_of(int64_t width, const Of& of) {
    constexpr int64_t BLOCK = 128 * REGISTER;
    double sum = 0;
    for (int64_t first = 0; first < width; first += BLOCK) {
        Part parts = {};
        float tail = 0;
        for_numbers(least(BLOCK, width - first), [&](auto kind, int64_t i) {
            if constexpr (sizeof(kind) == sizeof(float))
                tail += of(kind, first + i);
            else
                parts += of(kind, first + i);
        });
        sum += tail;
        for (int k = 0; k < REGISTER; ++k) sum += parts[k];
    }
    return sum;
}

inline float* place_of_exponentials(float* x, float*) { return x; }
inline float* place_of_exponentials(uint16_t*, float* room) { return room; }

// −Σ target · log softmax(x) of one row, where the target is (1 − smoothing) · onehot(label) + smoothing / width; in place
// of x, where that is asked for, softmax(x) − target.
template <class T>
double cross_entropy_of(T* x, int64_t label, int64_t width, float smoothing, bool gradient, float* room) {
    const float largest = largest_of(x, width);
    const auto below = [&](auto kind, int64_t i) { return get<decltype(kind)>(x + i) - largest; };
    const auto exponential_at = [&](auto kind, int64_t i) { return share_of_largest(below(kind, i)); };
    double picked = static_cast<double>(get<float>(x + label)) - largest;
    if (smoothing != 0) picked += smoothing * (sum_of(width, below) / static_cast<double>(width) - picked);
    if (!gradient) return __builtin_log(sum_of(width, exponential_at)) - picked;

    float* exponentials = place_of_exponentials(x, room);
    const double sum = sum_of(width, [&](auto kind, int64_t i) {
        const auto found = exponential_at(kind, i);
        put(exponentials + i, found);
        return found;
    });
    const float share = static_cast<float>(1.0 / sum), spread = smoothing / static_cast<float>(width);
    const float target = 1.0f - smoothing, of_target = exponentials[label] * share - target - spread;
    for_numbers(width, [&](auto kind, int64_t i) {
        using N = decltype(kind);
        put(x + i, product_plus(get<N>(exponentials + i), same<N>(share), same<N>(-spread)));
    });
    put(x + label, of_target);
    return __builtin_log(sum) - picked;
}

template <class T>
void cross_entropy(T* logits, const int64_t* labels, int64_t rows, int64_t width, float smoothing, bool gradient,
                   float* room, double* losses) {
    for (int64_t row = 0; row < rows; ++row)
        losses[row] = cross_entropy_of(logits + row * width, labels[row], width, smoothing, gradient, room);
}

template <class T>
constexpr Passes<T> PASSES{normalise<T>, normalise_backward<T>, gate<T>, gate_backward<T>, rotate<T>, cross_entropy<T>};

}  // namespace
}  // namespace veneer
