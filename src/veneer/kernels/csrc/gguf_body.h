// Blocks of 32 numbers to the bytes that a GGUF file keeps them as, each operation rounded as gguf's own in NumPy. Plain
// loops of a fixed length, which the compiler makes vectors of. Included after numbers.h, as body.h is.

namespace veneer {
namespace {

// What is no number, or out of reach, becomes 0, as the conversion to a byte makes it in NumPy on x86.
inline float within_reach(float value) { return (value > -32768.0f) & (value < 32768.0f) ? value : 0.0f; }

// The nearest fp16, a tie being the even one.
inline uint16_t to_fp16(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // from 65520 on
    if (magnitude < 0x38800000) {  // below 2⁻¹⁴ it has fewer bits: adding 0.5 leaves the multiples of 2⁻²⁴
        const float shifted = bits_as<float>(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13));
}

inline void put_fp16(uint8_t*& to, float value) {
    const uint16_t half = to_fp16(value);
    __builtin_memcpy(to, &half, sizeof half);
    to += sizeof half;
}

inline int magnitude_of(float value) { return static_cast<int>(bits_of(value) & 0x7fffffff); }

inline int largest_magnitude(const float* x) {
    int most = 0;
    for (int i = 0; i < GGUF_BLOCK; ++i) {
        const int magnitude = magnitude_of(x[i]);
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

// The first of the numbers that are farthest from 0, with its sign.
inline float farthest(const float* x) {
    const int most = largest_magnitude(x);
    int first = GGUF_BLOCK;
    for (int i = 0; i < GGUF_BLOCK; ++i) {
        const int here = magnitude_of(x[i]) == most ? i : GGUF_BLOCK;
        first = here < first ? here : first;
    }
    return x[first];
}

// The least and the largest number, in the order of integers that floats have but for their sign; NaN where one is.
inline void ends(const float* x, float& least, float& most) {
    int low = 0x7fffffff, high = -0x7fffffff - 1;
    for (int i = 0; i < GGUF_BLOCK; ++i) {
        const int bits = static_cast<int>(bits_of(x[i])), key = bits ^ (bits >> 31 & 0x7fffffff);
        low = key < low ? key : low;
        high = key > high ? key : high;
    }
    least = bits_as<float>(low ^ (low >> 31 & 0x7fffffff));
    most = bits_as<float>(high ^ (high >> 31 & 0x7fffffff));
    if (most != most) least = most;
    if (least != least) most = least;
}

inline float inverse(float step) { return step == 0.0f ? 0.0f : 1.0f / step; }

// 8 bits, a tie going away from 0.
inline void round_block8(const float* x, uint8_t* out) {
    const float step = bits_as<float>(largest_magnitude(x)) / 127.0f, by = inverse(step);
    put_fp16(out, step);
    int codes[GGUF_BLOCK];  // the bytes might lie over x, for all that the compiler knows
    for (int i = 0; i < GGUF_BLOCK; ++i) {
        const float scaled = x[i] * by;
        const int magnitude = magnitude_of(scaled), negative = static_cast<int>(bits_of(scaled)) >> 31;  // 0 or -1
        // `within_reach` by a mask: GCC makes branches of that one here, and no vectors.
        const float size = bits_as<float>(magnitude & -static_cast<int>(magnitude < 0x47000000));
        const int below = static_cast<int>(size);
        // Twice the rest is below 2, and its whole part says whether the rest is a half.
        const int code = below + static_cast<int>(2.0f * (size - static_cast<float>(below)));
        codes[i] = (code ^ negative) - negative;
    }
    for (int i = 0; i < GGUF_BLOCK; ++i) out[i] = static_cast<uint8_t>(codes[i]);
}

// 4 or 5 bits: of the way from the least number to the largest (LEAST), or around 0.
template <int BITS, bool LEAST>
void round_block(const float* x, uint8_t* out) {
    constexpr int TOP = (1 << BITS) - 1;
    float least = 0.0f, most;
    if (LEAST)
        ends(x, least, most);
    else
        most = farthest(x);
    const float step = LEAST ? (most - least) / TOP : most / -(1 << (BITS - 1)), by = inverse(step);
    const float half = LEAST ? 0.5f : (1 << (BITS - 1)) + 0.5f;
    put_fp16(out, step);
    if (LEAST) put_fp16(out, least);
    int codes[GGUF_BLOCK];
    for (int i = 0; i < GGUF_BLOCK; ++i) {
        const int code = static_cast<int>(within_reach((LEAST ? x[i] - least : x[i]) * by + half)) & 255;
        codes[i] = code < TOP ? code : TOP;
    }
    if (BITS == 5) {
        uint32_t fifth = 0;
        for (int i = 0; i < GGUF_BLOCK; ++i) fifth |= static_cast<uint32_t>(codes[i] >> 4) << i;
        __builtin_memcpy(out, &fifth, sizeof fifth);
        out += sizeof fifth;
    }
    for (int i = 0; i < GGUF_BLOCK / 2; ++i)
        out[i] = static_cast<uint8_t>((codes[i] & 15) | codes[i + GGUF_BLOCK / 2] << 4);
}

void round_blocks(const GgufBlocks& b, int64_t first, int64_t last) {
    const auto round = b.bits == 8   ? round_block8
                       : b.bits == 5 ? (b.least ? round_block<5, true> : round_block<5, false>)
                                     : (b.least ? round_block<4, true> : round_block<4, false>);
    const int64_t size = 2 + (b.least ? 2 : 0) + b.bits * GGUF_BLOCK / 8;
    for (int64_t i = first; i < last; ++i) round(b.source + i * GGUF_BLOCK, b.out + i * size);
}

}  // namespace
}  // namespace veneer
