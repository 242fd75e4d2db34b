// Attention of training over rows back to back, shared among threads. Not for the variants.
#pragma once

#include <vector>

#include "amx_attention.h"

namespace veneer {

// On a processor with AMX; raises std::invalid_argument where the kernels were not built for such.
void attention(const RowAttention&, const std::vector<int64_t>& lengths, const AttentionOut&, int threads);
void attention_backward(const RowAttention&, const std::vector<int64_t>& lengths, const AttentionGrads&, int threads);

}  // namespace veneer
