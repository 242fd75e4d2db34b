// One number, or a register of them. What a pass does to numbers is written once for both, and those at a row's end that
// fill no register become what the others become. In memory they are fp32, or bf16 as the upper halves of fp32. Included
// after lanes.h, within each variant's own unnamed namespace as that is.

typedef Lanes::Part Part;
typedef uint32_t Words __attribute__((vector_size(4 * REGISTER)));
typedef uint16_t Halves __attribute__((vector_size(2 * REGISTER)));

template <class N>
N same(float value);
template <>
inline float same<float>(float value) { return value; }
template <>
inline Part same<Part>(float value) { return value - Part{}; }

template <class To, class From>
inline To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

inline uint32_t bits_of(float value) { return bits_as<uint32_t>(value); }
inline Words bits_of(const Part& values) { return bits_as<Words>(values); }

template <class N>
inline N get(const float* from) {
    N numbers;
    __builtin_memcpy(&numbers, from, sizeof numbers);
    return numbers;
}

template <class N>
N get(const uint16_t* from);
template <>
inline float get<float>(const uint16_t* from) { return bits_as<float>(static_cast<uint32_t>(*from) << 16); }
template <>
inline Part get<Part>(const uint16_t* from) {
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof halves);
#if defined(__AVX512F__)  // GCC 12 takes four instructions for what is one
    const Words words = (Words)_mm512_cvtepu16_epi32((__m256i)halves);
#elif defined(__AVX2__)
    const Words words = (Words)_mm256_cvtepu16_epi32((__m128i)halves);
#else
    const Words words = __builtin_convertvector(halves, Words);
#endif
    return bits_as<Part>(words << 16);
}

// The bits of fp32 numbers, of which the upper halves are their nearest bf16, a tie being the even one. A NaN stays one.
inline uint32_t nearest_half(float value) {
    const uint32_t bits = bits_of(value);
    return value != value ? 0x7fc00000 : bits + ((bits >> 16) & 1) + 0x7fff;
}
inline Words nearest_half(const Part& values) {
    const Words bits = bits_of(values);
    return values != values ? Words{} + 0x7fc00000 : bits + ((bits >> 16) & 1) + 0x7fff;
}

inline void put(float* to, float value) { *to = value; }
inline void put(float* to, const Part& values) { __builtin_memcpy(to, &values, sizeof values); }
inline void put(uint16_t* to, float value) {
    *to = static_cast<uint16_t>(nearest_half(value) >> 16);
}
inline void put(uint16_t* to, const Part& values) {
    const Halves halves = __builtin_convertvector(nearest_half(values) >> 16, Halves);
    __builtin_memcpy(to, &halves, sizeof halves);
}

// Rounded to T, as if they had been kept there in between.
template <class T, class N>
inline N rounded_to(const N& numbers) {
    return sizeof(T) == 4 ? numbers : bits_as<N>(nearest_half(numbers) & 0xffff0000);
}

inline void load(Lanes& to, const uint16_t* from) {
    for (int k = 0; k < Lanes::PARTS; ++k) to.parts[k] = get<Part>(from + k * REGISTER);
}

// work(kind, i) of as many numbers from the i-th on as there are in ``kind``.
template <class Work>
inline void for_numbers(int64_t count, const Work& work) {
    int64_t i = 0;
    for (; i + REGISTER <= count; i += REGISTER) work(Part{}, i);
    for (; i < count; ++i) work(0.0f, i);
}

// a · b + c, in one rounding where the machine has an instruction for it.
inline Part product_plus(const Part& a, const Part& b, Part c) {
    add_product(c, a, b);
    return c;
}
inline float product_plus(float a, float b, float c) {
#if defined(__FMA__) || defined(VENEER_NEON)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// The larger, or the smaller, of two numbers; b or a NaN where one is a NaN.
inline float larger(float a, float b) { return a > b ? a : b; }
inline float smaller(float a, float b) { return a < b ? a : b; }
#if defined(__AVX512F__)
inline Part larger(const Part& a, const Part& b) { return (Part)_mm512_max_ps((__m512)a, (__m512)b); }
inline Part smaller(const Part& a, const Part& b) { return (Part)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline Part larger(const Part& a, const Part& b) { return (Part)_mm256_max_ps((__m256)a, (__m256)b); }
inline Part smaller(const Part& a, const Part& b) { return (Part)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(VENEER_NEON)
inline Part larger(const Part& a, const Part& b) { return (Part)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
inline Part smaller(const Part& a, const Part& b) { return (Part)vminq_f32((float32x4_t)a, (float32x4_t)b); }
#else
inline Part larger(const Part& a, const Part& b) { return a > b ? a : b; }
inline Part smaller(const Part& a, const Part& b) { return a < b ? a : b; }
#endif

// eˣ of −87 ≤ x ≤ 88: 2ⁿ · e^r with |r| ≤ ln 2 / 2, by the polynomial of Cephes' expf, within 2 units in the last place.
template <class N>
inline N exponential_between(const N& x) {
    const N shifted = product_plus(x, same<N>(1.44269504f), same<N>(12582912.0f));  // n in its lowest bits, as `rounded`
    const N n = shifted - 12582912.0f;
    const N r = product_plus(n, same<N>(2.12194440e-4f), product_plus(n, same<N>(-0.693359375f), x));
    N p = product_plus(same<N>(1.9875691500e-4f), r, same<N>(1.3981999507e-3f));
    p = product_plus(p, r, same<N>(8.3334519073e-3f));
    p = product_plus(p, r, same<N>(4.1665795894e-2f));
    p = product_plus(p, r, same<N>(1.6666665459e-1f));
    p = product_plus(p, r, same<N>(5.0000001201e-1f));
    p = product_plus(p, r * r, r) + 1.0f;
    return p * bits_as<N>((bits_of(shifted) + 127) << 23);
}

// eˣ, which beyond these ends stays what it is there. Without a branch, so that a loop of it becomes vectors.
template <class N>
inline N exponential(const N& x) {
    return exponential_between(smaller(same<N>(88.0f), larger(same<N>(-87.0f), x)));
}
