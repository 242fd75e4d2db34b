#include "decode.h"

#include <algorithm>
#include <memory>

#include "room.h"
#include "threads.h"

namespace veneer {

void Decoder::multiply(const std::vector<Job>& jobs, const float* x, int count, int threads) const {
    const int64_t columns = jobs[0].w.columns;
    int64_t elements = 0, rank = 0;
    bool exact = false, rounded = false;
    for (const Job& job : jobs) {
        elements += job.w.rows * columns;
        for (const Update& update : job.w.updates) rank += update.rank;
        rounded |= job.w.rounds();
        exact |= job.w.in_4_bits();
    }
    const std::unique_ptr<TokensRoom> apart(exact ? new TokensRoom(x, count, columns) : nullptr);
    const std::unique_ptr<BytesRoom> bytes(rounded ? new BytesRoom(x, count, columns) : nullptr);
    if (bytes) variant.round8(bytes->bytes);
    const auto low = lines<float>(count * rank);  // x Aᵀ of each update, one after another

    share(elements, threads, [&](int part, int parts) {
        float* to = low.get();
        for (const auto& [w, y] : jobs) {
            const Rows mine = rows_of(w.rows, part, parts);
            if (w.dense)
                variant.product_dense(w.dense, x, count, columns, mine, y);
            else if (w.wide.codes)
                variant.product_wide(w.wide, bytes->bytes, mine, y);
            else if (w.levels)
                variant.product_int8(w.packed, w.levels, w.step, bytes->bytes, mine, y);
            else if (w.in_4_bits())
                variant.product(w.packed, apart->tokens, mine, y);
            else
                variant.product8(w.packed, x, count, columns, mine, y);
            for (const Update& update : w.updates) {
                variant.product_dense(update.A, x, count, columns, rows_of(update.rank, part, parts), to);
                to += count * update.rank;
            }
        }
        if (rank) wait_for_all();
        const float* from = low.get();
        for (const auto& [w, y] : jobs) {
            const Rows mine = rows_of(w.rows, part, parts);
            if (w.bias)
                for (int m = 0; m < count; ++m)
                    for (int64_t i = mine.first; i < mine.last; ++i) y[m * w.rows + i] += w.bias[i];
            for (const Update& update : w.updates) {
                for (int m = 0; m < count; ++m, from += update.rank)
                    for (int64_t i = mine.first; i < mine.last; ++i) {
                        float sum = 0;
                        for (int64_t k = 0; k < update.rank; ++k) sum += update.B[i * update.rank + k] * from[k];
                        y[m * w.rows + i] += update.scale * sum;
                    }
            }
        }
    });
}

void Decoder::rotate(float* x, const int64_t* positions, int count, int heads) const {
    for (int m = 0; m < count; ++m, x += heads * shape.dim)
        variant.fp32.rotate(x, shape.dim, shape.cosines + positions[m] * shape.dim, shape.sines + positions[m] * shape.dim,
                       heads, shape.dim, false, x);
}

// (count, key heads, dim) into (sequences, key heads, room, dim).
void Decoder::store(const float* from, const int64_t* sequences, const int64_t* positions, int count, float* to) const {
    for (int m = 0; m < count; ++m)
        for (int head = 0; head < shape.key_heads; ++head, from += shape.dim)
            std::copy_n(from, shape.dim,
                        to + ((sequences[m] * shape.key_heads + head) * shape.room + positions[m]) * shape.dim);
}

void Decoder::step(float* x, const int64_t* sequences, const int64_t* positions, int count, float* logits,
                   int threads) const {
    const Layer& like = layers.at(0);
    const int64_t hidden = head.columns, inner = like.gate.rows;
    const int64_t longest = *std::max_element(positions, positions + count) + 1;
    const auto normed = lines<float>(count * hidden), change = lines<float>(count * hidden);
    const auto queries = lines<float>(count * like.query.rows), attended = lines<float>(count * like.query.rows);
    const auto keys = lines<float>(count * like.key.rows), values = lines<float>(count * like.value.rows);
    const auto gate = lines<float>(count * inner), up = lines<float>(count * inner);
    const auto normalise = [&](const float* from, const float* weight, int64_t rows, int64_t width, float* to) {
        variant.fp32.normalise(from, weight, shape.eps, false, rows, width, to, nullptr);
    };
    for (const Layer& layer : layers) {
        normalise(x, layer.input_norm, count, hidden, normed.get());
        multiply({{layer.query, queries.get()}, {layer.key, keys.get()}, {layer.value, values.get()}}, normed.get(), count,
                 threads);
        if (layer.query_norm) normalise(queries.get(), layer.query_norm, count * shape.heads, shape.dim, queries.get());
        if (layer.key_norm) normalise(keys.get(), layer.key_norm, count * shape.key_heads, shape.dim, keys.get());
        rotate(queries.get(), positions, count, shape.heads);
        rotate(keys.get(), positions, count, shape.key_heads);
        store(keys.get(), sequences, positions, count, layer.keys);
        store(values.get(), sequences, positions, count, layer.values);
        const Attention attention{queries.get(), layer.keys, layer.values, attended.get(), sequences, positions, count,
                                  shape.heads, shape.key_heads, shape.dim, shape.room, shape.scaling};
        share(longest * count * layer.query.rows, threads, [&](int part, int parts) {
            const Rows mine = rows_of(count * shape.heads, part, parts);
            variant.attend(attention, mine.first, mine.last);
        });
        multiply({{layer.output, change.get()}}, attended.get(), count, threads);
        for (int64_t i = 0; i < count * hidden; ++i) x[i] += change[i];

        normalise(x, layer.output_norm, count, hidden, normed.get());
        multiply({{layer.gate, gate.get()}, {layer.up, up.get()}}, normed.get(), count, threads);
        variant.fp32.gate(gate.get(), up.get(), count * inner, false, gate.get());
        multiply({{layer.down, change.get()}}, gate.get(), count, threads);
        for (int64_t i = 0; i < count * hidden; ++i) x[i] += change[i];
    }
    normalise(x, norm, count, hidden, normed.get());
    multiply({{head, logits}}, normed.get(), count, threads);
}

}  // namespace veneer
