// A step of generation through a whole model of Llama's kind, in one call: for a small model, and one token at a time,
// calling the layers from Python takes longer than what they do.
#pragma once

#include <vector>

#include "kernels.h"

namespace veneer {

// ΔW = scale · B A, A (rank, columns) and B (rows, rank).
struct Update {
    const float *A, *B;
    int64_t rank;
    float scale;
};

// y = W x + b + Σ ΔW x with W (rows, columns) in one of its forms.
struct Linear {
    int64_t rows, columns;
    const float* dense = nullptr;
    Wide wide{};                     // where its codes are not null
    Packed packed{};                 // else: in 4 bits, or of int8 where it has no table and no levels
    const int8_t* levels = nullptr;  // of packed, where x is rounded to 8 bits
    float step = 0;
    const float* bias = nullptr;
    std::vector<Update> updates{};

    bool rounds() const { return wide.codes || levels; }
    bool in_4_bits() const { return packed.table && !levels; }  // and x as it is
};

struct Layer {
    const float *input_norm, *output_norm;  // (hidden,): before attention, before the gated layer
    const float *query_norm, *key_norm;     // (dim,), or null
    Linear query, key, value, output, gate, up, down;
    float *keys, *values;  // (sequences, key heads, room, dim)
};

struct Shape {
    int heads, key_heads, dim;
    int64_t room;                  // positions for which there are keys and values
    float scaling, eps;
    const float *cosines, *sines;  // (room, dim)
};

class Decoder {
public:
    Decoder(const Variant& variant, const Shape& shape, const float* norm, const Linear& head)
        : variant(variant), shape(shape), norm(norm), head(head) {}

    // x (count, hidden) of up to 8 tokens, which it overwrites; token m is the one at positions[m] of sequences[m], and
    // those of a sequence come in order. Fills their keys and values, and logits (count, vocabulary).
    void step(float* x, const int64_t* sequences, const int64_t* positions, int count, float* logits, int threads) const;

    std::vector<Layer> layers;

private:
    // A linear layer and where its output goes, (count, rows).
    struct Job {
        const Linear& w;
        float* y;
    };
    // The products of one x (count, columns) by several weights, which the threads share.
    void multiply(const std::vector<Job>& jobs, const float* x, int count, int threads) const;
    void rotate(float* x, const int64_t* positions, int count, int heads) const;
    void store(const float* from, const int64_t* sequences, const int64_t* positions, int count, float* to) const;

    const Variant& variant;
    const Shape shape;
    const float* norm;
    const Linear head;
};

}  // namespace veneer
