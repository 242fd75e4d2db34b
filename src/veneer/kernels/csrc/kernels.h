// What the variants offer and the arguments they take. Nothing here has a body with vector code in it: the variants are
// compiled with flags of their own, and an inline function they shared could be linked into code for a lesser machine.
#pragma once

#include <cstdint>

namespace veneer {

constexpr int GROUP = 32;         // columns of x in 8 bits that share a scale

// The scale of each block: fp32 values, or 8-bit codes with a table, scales of their own and an offset.
struct Scales {
    const float* values;          // (blocks,), or null when nested
    const uint8_t* codes;         // (blocks,)
    const float* table;           // (256,)
    const float* nested;          // (ceil(blocks / nested block),)
    const float* offset;          // one number
    int nested_shift;             // log2 of the nested block
};

// A weight in 4 bits: two codes a byte, the first in the high half; block b is the elements [b · block, (b + 1) · block).
// Or of int8 storage, for quantise8, dequantise8 and product8: a code a byte, which stands for (code − 127) / 127.
struct Packed {
    const uint8_t* codes;
    const float* table;           // (16,); of int8 null
    Scales scales;
    int64_t block;                // a multiple of 32
};

// Elements 0..count of source → codes and the largest absolute value of each block, in which a NaN or infinity shows.
struct Quantise {
    const float* source;
    int64_t count;
    const float* boundaries;      // (15,) ascending; of int8 (254,)
    const uint8_t* order;         // (16,) the code of each interval between boundaries; of int8 null: its number
    int64_t block;
    uint8_t* codes;
    float* absmax;
};

constexpr int GGUF_BLOCK = 32;    // numbers that a GGUF file keeps together

// Blocks of numbers → a GGUF file's bytes, of this many bits (4, 5 or 8): the step in fp16; the least number, if codes
// count from it, in fp16; of 5 bits the highest; the codes.
struct GgufBlocks {
    const float* source;
    int bits;
    bool least;
    uint8_t* out;
};

// x of a few tokens, taken apart: lane(parity, token, half) holds x[parity + half], x[parity + half + 2], …, so that the
// two codes of a byte meet x without a shuffle wherever a row begins.
struct Tokens {
    const float* lanes;
    int64_t stride;               // between lanes
    const float* x;               // (tokens, columns)
    int64_t columns;
    int count;                    // 1..8

    const float* lane(int parity, int token, int half) const {
        return lanes + ((parity * count + token) * 2 + half) * stride;
    }
};

// x of a few tokens in 8 bits: each group of 32 columns has a scale. Even and odd columns lie apart, as in Tokens; tails
// are zeros up to a multiple of 128 columns.
struct Bytes {
    int8_t* lanes;                // (count, 2, stride)
    int32_t* corrections;         // (count, stride / 4): -128 times the sum of each eight columns
    float* scales;                // (count, columns / 32)
    float* scale_lanes;           // (count, stride / 4): the scale of each eight columns, zeros beyond the end
    int64_t stride;               // a multiple of 64
    const float* x;               // (count, columns)
    int64_t columns;              // a multiple of 32
    int count;                    // 1..8
};

// A weight in 8 bits, as the product in 8 bits takes it: codes are integers of −127 … 127 plus 128, each row's even and
// odd columns apart as in Bytes, and a row has a scale.
struct Wide {
    const uint8_t* codes;         // (rows, 2, stride)
    const float* scales;          // (rows,)
};

// Attention of a few tokens, each over the keys and values of its own sequence up to its own position.
struct Attention {
    const float* queries;         // (count, heads, dim)
    const float* keys;            // (sequences, key heads, room, dim)
    const float* values;          // as keys
    float* out;                   // as queries
    const int64_t* sequences;     // (count,)
    const int64_t* positions;     // (count,)
    int count, heads, key_heads, dim;  // dim a multiple of 16, at most 256
    int64_t room;
    float scaling;                // of a query's product with a key
};

// The rows of a weight that one thread multiplies by, of all that it has.
struct Rows {
    int64_t first, last, all;
};

// Some rows and columns [first, last) of a weight of so many columns.
struct Piece {
    int64_t columns, first_row, last_row, first, last;
};

// A frozen weight (rows, columns) as products in bf16 take it: in one of three types with rows ``stride`` apart, or in
// codes.
struct Weight16 {
    enum Kind { BF16, FP32, FP16, CODES4, CODES8 } kind;
    const void* values;           // of the first three
    int64_t rows, columns, stride;
    Packed packed;                // of the others
};

// Tasks that threads take one after another, each when it is done with its last: one core of a machine that others use
// may be four times as slow as the next. Results do not depend on who took what.
struct Turn {
    int part, parts;              // which thread this is, of how many there is room for
    int64_t* next;                // the first task that nobody has taken
    int64_t take() const { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }
};

// A frozen weight and a low-rank update of it, in bf16 with sums in fp32: y ← x Wᵀ + bias + scale · low Bᵀ, low being
// x Aᵀ rounded. What is ``transposed`` has W as (into, out). ``room`` is for `tiled_room` bytes.
struct Adapted {
    const uint16_t* x;            // (tokens, into)
    int64_t tokens, into, out, rank;
    Weight16 weight;
    bool transposed;
    const float* bias;            // (out,), or null
    const float *A, *B;           // (rank, into), (out, rank)
    float scale;
    uint16_t *low, *y;            // (tokens, rank), (tokens, out)
    char* room;
};

// Its gradients: grad_x ← grad W + grad_low A, with grad_low = scale · grad B rounded, and, if they are not null,
// grad_A ← grad_lowᵀ x, grad_B ← scale · gradᵀ low. Of grad_x, too, if that is not null.
struct AdaptedBackward {
    Adapted forward;              // whose y is nobody's
    const uint16_t* grad;         // (tokens, out)
    uint16_t* grad_x;             // (tokens, into)
    float *grad_A, *grad_B;
};

// Some tokens and a low-rank update of them: low ← x Aᵀ and y ← y + low · Bt, Bt being the scale times Bᵀ.
struct Updated {
    const float* x;               // (tokens, into)
    const float* A;               // (rank, into)
    const float* Bt;              // (rank, out)
    int64_t into, out, rank;
    float* low;                   // (tokens, rank)
    float* y;                     // (tokens, out)
};

// Its gradients: of x, added to grad_x (null if nobody asks), and those of A and Bt, added to `UpdateSums`, which each
// thread has for itself.
struct UpdateBackward {
    const float* grad;            // (tokens, out)
    const float *x, *low, *A, *Bt;  // as above
    int64_t into, out, rank;
    float* grad_x;                // (tokens, into)
};

struct UpdateSums {
    float* grad_A;                // (rank, into)
    float* grad_Bt;               // (rank, out)
    float* room;                  // for a few tokens' gradient of low
};

constexpr int UPDATE_TOKENS = 8;  // for which there must be room

// The passes between products, of numbers kept as T: fp32, or bf16 as the upper halves of fp32, which is rounded to
// wherever the models round. Weights of norms are fp32 for either.
template <class T>
struct Passes {
    // out ← weight · x / √(mean(x²) + eps) of each row; out may be x. The reciprocals of the roots, too, if not null.
    // ``once``: what is normed is not rounded before the weight multiplies it.
    void (*normalise)(const T* x, const float* weight, float eps, bool once, int64_t rows, int64_t width, T* out,
                      float* inverses);
    void (*normalise_backward)(const T* grad, const T* x, const float* inverses, const float* weight, bool once,
                               int64_t rows, int64_t width, T* out);
    // out ← silu(gate) · up, or gelu(gate) · up; out may be gate.
    void (*gate)(const T* gate, const T* up, int64_t count, bool gelu, T* out);
    void (*gate_backward)(const T* grad, const T* gate, const T* up, int64_t count, bool gelu, T* grad_gate, T* grad_up);
    // One token's heads, ``stride`` apart, rotated by the angles of its position: cosines and sines (dim,), halves apart
    // as transformers lays them out (Su et al., 2021, arXiv:2104.09864), into out (heads, dim), which may be x. Or by
    // the transposed matrix, which takes gradients back.
    void (*rotate)(const T* x, int64_t stride, const T* cosines, const T* sines, int heads, int dim, bool transposed,
                   T* out);
    // The cross-entropy of each row of logits (rows, width) with its label, of which ``smoothing`` is spread over all;
    // the gradients take the logits' place, where they are asked for. There is room for a row in fp32 then, if in bf16.
    void (*cross_entropy)(T* logits, const int64_t* labels, int64_t rows, int64_t width, float smoothing, bool gradient,
                          float* room, double* losses);
};

struct Variant {
    const char* name;
    void (*quantise)(const Quantise&, int threads);
    void (*quantise8)(const Quantise&, int threads);
    // Elements [start, stop) into out, as fp32 or as the upper halves of fp32 rounded to nearest even.
    void (*dequantise)(const Packed&, int64_t start, int64_t stop, float* out, int threads);
    void (*dequantise_bf16)(const Packed&, int64_t start, int64_t stop, uint16_t* out, int threads);
    void (*dequantise8)(const Packed&, int64_t start, int64_t stop, float* out, int threads);
    void (*dequantise8_bf16)(const Packed&, int64_t start, int64_t stop, uint16_t* out, int threads);
    // How many of 255 ascending boundaries lie below each value.
    void (*nearest)(const float* values, int64_t count, const float* boundaries, uint8_t* found, int threads);

    // Products x Wᵀ of 1..8 tokens, by some rows of W, into out (count, rows.all). The caller has the threads.
    void (*product)(const Packed&, const Tokens&, const Rows&, float* out);
    // x in 8 bits, which `round8` fills in first; of a weight in 4 bits with step · levels (16,) for the table.
    void (*round8)(const Bytes&);
    void (*product_int8)(const Packed&, const int8_t* levels, float step, const Bytes&, const Rows&, float* out);
    void (*product_wide)(const Wide&, const Bytes&, const Rows&, float* out);
    // x (count, columns), fp32, by a weight (rows, columns) of int8 storage, and by one in fp32.
    void (*product8)(const Packed&, const float* x, int count, int64_t columns, const Rows&, float* out);
    void (*product_dense)(const float* weight, const float* x, int count, int64_t columns, const Rows&, float* out);

    // The items [first, last) of count · heads.
    void (*attend)(const Attention&, int64_t first, int64_t last);
    Passes<float> fp32;
    Passes<uint16_t> bf16;
    // Of the tokens [first, last).
    void (*update)(const Updated&, int64_t first, int64_t last);
    void (*update_backward)(const UpdateBackward&, int64_t first, int64_t last, const UpdateSums&);
    // Part of a weight in codes, one row after another.
    void (*dequantise_part)(const Packed&, const Piece&, uint16_t* out);
    void (*dequantise8_part)(const Packed&, const Piece&, uint16_t* out);
    // The blocks [first, last).
    void (*round_blocks)(const GgufBlocks&, int64_t first, int64_t last);

    // Products in bf16 by tiles, null where there are none. The caller has the threads, which wait for one another
    // between the two halves: rows laid out as tiles and multiplied by the update's thin side, and the rest.
    int64_t (*tiled_room)(const Adapted&, int threads);
    void (*lay_out)(const Adapted&, const Turn&);
    void (*multiply)(const Adapted&, const Turn&);
    void (*lay_out_backward)(const AdaptedBackward&, const Turn&);
    void (*multiply_backward)(const AdaptedBackward&, const Turn&);
};

extern const Variant scalar;
#ifdef VENEER_X86
extern const Variant avx2;
extern const Variant avx512;
#endif
#ifdef VENEER_AMX
const Variant& with_tiles();  // AVX-512's, and what AMX computes
#endif
#ifdef VENEER_ARM
extern const Variant neon;
#endif

}  // namespace veneer
