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
