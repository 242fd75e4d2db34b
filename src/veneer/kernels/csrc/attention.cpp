#include "attention.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "room.h"
#include "threads.h"

namespace veneer {
namespace {

#ifdef VENEER_AMX
struct Row {
    int64_t first, length;
};

// work(row, key head, room of so many bytes), the longest rows first, each by the next thread that is free: every number
// is one thread's alone, so how many there are changes none of them.
template <class Work>
void for_each_row(const RowAttention& a, const std::vector<int64_t>& lengths, int64_t (*room)(const RowAttention&, int64_t),
                  int threads, const Work& work) {
    std::vector<Row> rows;
    int64_t first = 0;
    for (const int64_t length : lengths) {
        if (length > 0) rows.push_back({first, length});
        first += length;
    }
    if (rows.empty()) return;
    std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.length > b.length; });
    const int64_t items = static_cast<int64_t>(rows.size()) * a.key_heads, bytes = room(a, rows[0].length);
    const int used = static_cast<int>(std::min<int64_t>(threads, items));
    const auto rooms = lines<char>(used * bytes);
    std::atomic<int64_t> next{0};
    share(first * a.heads * a.dim, used, [&](int part, int) {
        for (int64_t i = next++; i < items; i = next++)
            work(rows[i / a.key_heads], static_cast<int>(i % a.key_heads), rooms.get() + part * bytes);
    });
}
#else
template <class... Arguments>
void refuse(const Arguments&...) {
    throw std::invalid_argument("this attention is for processors with AMX");
}
#endif

}  // namespace

void attention(const RowAttention& a, const std::vector<int64_t>& lengths, const AttentionOut& out, int threads) {
#ifdef VENEER_AMX
    for_each_row(a, lengths, attend_row_room, threads, [&](const Row& row, int key_head, void* room) {
        attend_row(a, row.first, row.length, key_head, out, room);
    });
#else
    refuse(a, lengths, out, threads);
#endif
}

void attention_backward(const RowAttention& a, const std::vector<int64_t>& lengths, const AttentionGrads& grads,
                        int threads) {
#ifdef VENEER_AMX
    for_each_row(a, lengths, attend_row_backward_room, threads, [&](const Row& row, int key_head, void* room) {
        attend_row_backward(a, row.first, row.length, key_head, grads, room);
    });
#else
    refuse(a, lengths, grads, threads);
#endif
}

}  // namespace veneer
