// Within each variant's own namespace, so that it is compiled with that variant's instructions.

// The largest of ``most`` and the bits of |x[i]|, …, |x[n − 1]|, as the number that they are. The bits of |x| order as
// |x| does, infinity and NaN above all numbers: one maximum finds both.
inline float largest_from(uint32_t most, const float* x, int64_t i, int64_t n) {
    for (; i < n; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        if (bits > most) most = bits;
    }
    float found;
    __builtin_memcpy(&found, &most, 4);
    return found;
}
