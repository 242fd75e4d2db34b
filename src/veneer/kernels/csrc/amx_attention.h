// Attention of training, rows back to back, in bf16 by AMX tiles (FlashAttention-2: Dao, 2023, arXiv:2307.08691).
#pragma once

#include <cstdint>

namespace veneer {

// bf16 (tokens, heads, dim) at these distances; dim lies densely.
struct Heads {
    const uint16_t* data;
    int64_t of_token, of_head;
};

// One row of tokens: every query attends to the keys of the row, causally to itself and those before it, and of these
// to `window` at most, itself among them.
struct RowAttention {
    Heads queries, keys, values;
    int64_t tokens;               // of all rows, which `lse` strides by
    int heads, key_heads, dim;    // dim a multiple of 16, at most 256
    float scaling;                // above 0
    bool causal;
    int64_t window;               // INT64_MAX: all; else only where causal
};

// Of a forward pass: the outputs (tokens, heads, dim), densely, and the logarithm of each query's sum of exponentials.
struct AttentionOut {
    uint16_t* out;
    float* lse;                   // (heads, tokens)
};

struct AttentionGrads {
    Heads grad, out;              // the output's gradient, and the output
    const float* lse;             // (heads, tokens)
    uint16_t *queries, *keys, *values;  // the gradients, densely
};

// Bytes that one thread needs for a row of `length` tokens, from a cache line on.
int64_t attend_row_room(const RowAttention&, int64_t length);
int64_t attend_row_backward_room(const RowAttention&, int64_t length);

// The row of `length` tokens from `first` on: the query heads of one key head.
void attend_row(const RowAttention&, int64_t first, int64_t length, int key_head, const AttentionOut&, void* room);
void attend_row_backward(const RowAttention&, int64_t first, int64_t length, int key_head, const AttentionGrads&,
                         void* room);

}  // namespace veneer
