// Sixteen numbers, in as many registers as this machine's vectors take for them. Within each variant's own namespace. One
// vector type of sixteen numbers would be simpler, but GCC keeps what is wider than a register in memory: with AVX2 the
// sums of a product were a twelfth as fast.

constexpr int LANES = 16;

#if defined(__AVX512F__)
constexpr int REGISTER = 16;
#elif defined(__AVX2__)
constexpr int REGISTER = 8;
#else
constexpr int REGISTER = 4;
#endif

struct Lanes {
    typedef float Part __attribute__((vector_size(4 * REGISTER)));
    static constexpr int PARTS = LANES / REGISTER;
    Part parts[PARTS];

    void operator+=(const Lanes& other) {
        for (int k = 0; k < PARTS; ++k) parts[k] += other.parts[k];
    }
    void operator*=(const Lanes& other) {
        for (int k = 0; k < PARTS; ++k) parts[k] *= other.parts[k];
    }
    void operator*=(float by) {
        for (int k = 0; k < PARTS; ++k) parts[k] *= by;
    }
};

inline Lanes operator*(Lanes a, const Lanes& b) {
    a *= b;
    return a;
}

inline Lanes operator*(Lanes a, float by) {
    a *= by;
    return a;
}

inline void load(Lanes& to, const float* from) {
    for (int k = 0; k < Lanes::PARTS; ++k) __builtin_memcpy(&to.parts[k], from + k * REGISTER, sizeof to.parts[k]);
}

inline void store(const Lanes& from, float* to) {
    for (int k = 0; k < Lanes::PARTS; ++k) __builtin_memcpy(to + k * REGISTER, &from.parts[k], sizeof from.parts[k]);
}

inline float total(const Lanes& lanes) {
    float sum = 0;
    for (int k = 0; k < Lanes::PARTS; ++k)
        for (int i = 0; i < REGISTER; ++i) sum += lanes.parts[k][i];
    return sum;
}

// sum ← sum + a · b, in one rounding where the machine has an instruction for it; the compiler is told not to.
inline void add_product(Lanes::Part& sum, const Lanes::Part& a, const Lanes::Part& b) {
#if defined(__AVX512F__)
    sum = (Lanes::Part)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__)
    sum = (Lanes::Part)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(VENEER_NEON)
    sum = (Lanes::Part)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    sum += a * b;
#endif
}

inline void add_product(Lanes& sum, const Lanes& a, const Lanes& b) {
    for (int k = 0; k < Lanes::PARTS; ++k) add_product(sum.parts[k], a.parts[k], b.parts[k]);
}

inline void add_product(Lanes& sum, const Lanes& a, float b) {
    const Lanes::Part same = b - Lanes::Part{};
    for (int k = 0; k < Lanes::PARTS; ++k) add_product(sum.parts[k], a.parts[k], same);
}
