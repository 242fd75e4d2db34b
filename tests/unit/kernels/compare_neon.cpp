// The NEON variant against the scalar one on random input: make test-neon, which emulates the processor.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../../src/veneer/kernels/csrc/kernels.h"
#include "../../../src/veneer/kernels/csrc/room.h"

using namespace veneer;

namespace {

std::mt19937 drawn(0);
float uniform(float from, float to) { return std::uniform_real_distribution<float>(from, to)(drawn); }
int64_t whole(int64_t from, int64_t to) { return std::uniform_int_distribution<int64_t>(from, to)(drawn); }

void expect(bool holds, const char* what, int64_t rows, int64_t columns, int64_t block) {
    if (holds) return;
    std::printf("%s: NEON differs from scalar (rows %lld, columns %lld, block %lld)\n", what,
                static_cast<long long>(rows), static_cast<long long>(columns), static_cast<long long>(block));
    std::exit(1);
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Of a network's sizes; of any at all, subnormal and huge; zeros; what is not finite.
float value(int kind) {
    if (kind == 0) return uniform(-1, 1);
    if (kind == 1) return uniform(-1, 1) * std::pow(10.0f, uniform(-44, 37));
    if (kind == 2) return whole(0, 1) ? 0.0f : uniform(-1, 1);
    return whole(0, 99) ? uniform(-1, 1) : (whole(0, 1) ? NAN : -INFINITY);
}

struct Case {
    int64_t rows, columns, block, size = rows * columns, blocks = (size + block - 1) / block;
    float table[16], dynamic[256], offset = uniform(0, 1);
    int8_t levels[16];
    std::vector<uint8_t> codes, nested_codes;
    std::vector<float> absmax, nested;
    Packed w{};

    Case(int64_t r, int64_t c, int64_t b, bool double_scales) : rows(r), columns(c), block(b) {
        for (float& entry : table) entry = uniform(-1, 1);
        for (float& entry : dynamic) entry = uniform(-1, 1);
        for (int8_t& level : levels) level = static_cast<int8_t>(whole(-127, 127));
        for (int64_t i = 0; i < (size + 1) / 2; ++i) codes.push_back(static_cast<uint8_t>(whole(0, 255)));
        for (int64_t i = 0; i < blocks; ++i) {
            nested_codes.push_back(static_cast<uint8_t>(whole(0, 255)));
            absmax.push_back(uniform(0, 1));
        }
        for (int64_t i = 0; i < blocks / 16 + 1; ++i) nested.push_back(uniform(0, 1));
        Scales scales{};
        scales.values = absmax.data();
        if (double_scales) scales = {nullptr, nested_codes.data(), dynamic, nested.data(), &offset, 4};
        w = {codes.data(), table, scales, block};
    }

    void check_quantise(int kind) {
        std::vector<float> source(size), boundaries(15), scales[2] = {absmax, absmax};
        for (float& x : source) x = value(kind);
        for (int i = 0; i < 15; ++i) boundaries[i] = -0.9f + 0.12f * static_cast<float>(i);
        if (kind == 2)  // ties
            for (int64_t i = 0; i < size; ++i) source[i] = i % 32 ? boundaries[whole(0, 14)] : 1.0f;
        uint8_t order[16];
        for (int i = 0; i < 16; ++i) order[i] = static_cast<uint8_t>((5 * i + 3) % 16);
        std::vector<uint8_t> found[2] = {codes, codes};
        for (int k = 0; k < 2; ++k)
            (k ? neon : scalar)
                .quantise({source.data(), size, boundaries.data(), order, block, found[k].data(), scales[k].data()}, 1);
        expect(same(scales[0], scales[1]), "scales", rows, columns, block);
        for (int64_t i = 0; i < size; ++i)  // the codes of a block that is not finite mean nothing
            if (std::isfinite(scales[0][i / block]))
                expect(found[0][i / 2] == found[1][i / 2], "codes", rows, columns, block);
    }

    void check_quantise8() {
        std::vector<float> source(size), boundaries(254), scales[2] = {absmax, absmax};
        for (int i = 0; i < 254; ++i) boundaries[i] = (static_cast<float>(i) - 126.5f) / 127.0f;
        for (int64_t i = 0; i < size; ++i)
            source[i] = i % 32 ? (whole(0, 3) ? uniform(-1, 1) : boundaries[whole(0, 253)]) : 1.0f;
        std::vector<uint8_t> found[2];
        for (int k = 0; k < 2; ++k) {
            found[k].assign(size, 0);
            (k ? neon : scalar)
                .quantise8({source.data(), size, boundaries.data(), nullptr, block, found[k].data(), scales[k].data()}, 1);
        }
        expect(same(scales[0], scales[1]) && same(found[0], found[1]), "codes of int8", rows, columns, block);
    }

    void check_dequantise() {
        const int64_t start = whole(0, size - 1), stop = whole(start + 1, size);
        std::vector<float> out[2];
        std::vector<uint16_t> halves[2];
        for (int k = 0; k < 2; ++k) {
            out[k].assign(size + 8, 7.0f);
            halves[k].assign(size + 8, 7);
            (k ? neon : scalar).dequantise(w, start, stop, out[k].data() + 4, 1);
            (k ? neon : scalar).dequantise_bf16(w, start, stop, halves[k].data() + 4, 1);
        }
        expect(same(out[0], out[1]) && same(halves[0], halves[1]), "values", rows, columns, block);
        for (int k = 0; k < 2; ++k) {
            (k ? neon : scalar).dequantise8(a_code_each(), start, stop, out[k].data() + 4, 1);
            (k ? neon : scalar).dequantise8_bf16(a_code_each(), start, stop, halves[k].data() + 4, 1);
        }
        expect(same(out[0], out[1]) && same(halves[0], halves[1]), "values of int8", rows, columns, block);
    }

    std::vector<uint8_t> of_int8;
    Packed a_code_each() {
        for (int64_t i = static_cast<int64_t>(of_int8.size()); i < size; ++i)
            of_int8.push_back(static_cast<uint8_t>(whole(0, 254)));
        return {of_int8.data(), nullptr, w.scales, block};
    }

    void check_products(int tokens) {
        std::vector<float> x(tokens * columns), out[2], values(size), sizes(tokens * rows);
        for (float& entry : x) entry = uniform(-1, 1);
        scalar.dequantise(w, 0, size, values.data(), 1);
        const TokensRoom apart(x.data(), tokens, columns);
        const Rows all{0, rows, rows};
        for (int k = 0; k < 2; ++k) {
            out[k].assign(tokens * rows, 0);
            (k ? neon : scalar).product(w, apart.tokens, all, out[k].data());
        }
        near(out, x, values, tokens, "product");
        scalar.dequantise8(a_code_each(), 0, size, values.data(), 1);
        for (int k = 0; k < 2; ++k)
            (k ? neon : scalar).product8(a_code_each(), x.data(), tokens, columns, all, out[k].data());
        near(out, x, values, tokens, "product of int8");
        if (columns % GROUP) return;
        const float step = 1.0f / 112;
        float table8[16];
        for (int i = 0; i < 16; ++i) table8[i] = static_cast<float>(levels[i]) * step;
        Packed rounded = w;
        rounded.table = table8;
        scalar.dequantise(rounded, 0, size, values.data(), 1);
        for (int k = 0; k < 2; ++k) {
            const BytesRoom bytes(x.data(), tokens, columns);
            (k ? neon : scalar).round8(bytes.bytes);
            (k ? neon : scalar).product_int8(w, levels, step, bytes.bytes, all, out[k].data());
        }
        near(out, x, values, tokens, "product in 8 bits");

        const int64_t stride = (columns + 127) / 128 * 64;
        std::vector<uint8_t> wide(rows * 2 * stride);
        for (uint8_t& code : wide) code = static_cast<uint8_t>(whole(1, 255));
        std::vector<float> of_rows(rows, 1.0f);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < columns; ++i)
                values[r * columns + i] = static_cast<float>(wide[(2 * r + i % 2) * stride + i / 2] - 128);
        for (int k = 0; k < 2; ++k) {
            const BytesRoom bytes(x.data(), tokens, columns);
            (k ? neon : scalar).round8(bytes.bytes);
            (k ? neon : scalar).product_wide({wide.data(), of_rows.data()}, bytes.bytes, all, out[k].data());
        }
        near(out, x, values, tokens, "product of a weight in 8 bits");
        for (int k = 0; k < 2; ++k)
            (k ? neon : scalar).product_dense(values.data(), x.data(), tokens, columns, all, out[k].data());
        near(out, x, values, tokens, "product of a dense weight");
    }

    // The passes between products, on rows × columns numbers kept as T.
    template <class T>
    void check_passes(const Passes<T>& ours, const Passes<T>& theirs, float within) {
        const auto drawn_numbers = [&](int64_t count) {
            std::vector<T> numbers(count);
            for (T& number : numbers) keep(uniform(-4, 4), number);
            return numbers;
        };
        const std::vector<T> x = drawn_numbers(size), y = drawn_numbers(size), z = drawn_numbers(size);
        std::vector<float> weight(columns), inverses[2], room(columns);
        for (float& entry : weight) entry = uniform(-4, 4);
        std::vector<int64_t> labels(rows);
        for (int64_t& label : labels) label = whole(0, columns - 1);
        const int dim = 32;
        const std::vector<T> query = drawn_numbers(2 * dim), tables = drawn_numbers(2 * dim);
        std::vector<T> out[2];
        std::vector<double> losses[2];
        for (int k = 0; k < 2; ++k) {
            const Passes<T>& v = k ? ours : theirs;
            out[k].assign(11 * size + 4 * dim, 0);
            inverses[k].assign(rows, 0);
            losses[k].assign(2 * rows, 0);
            T* to = out[k].data();
            for (int flag = 0; flag < 2; ++flag) {
                v.normalise(x.data(), weight.data(), 1e-5f, flag, rows, columns, to, inverses[k].data());
                v.normalise_backward(y.data(), x.data(), inverses[0].data(), weight.data(), flag, rows, columns, to + size);
                v.gate(x.data(), y.data(), size, flag, to + 2 * size);
                v.gate_backward(z.data(), x.data(), y.data(), size, flag, to + 3 * size, to + 4 * size);
                to += 5 * size;
            }
            std::copy(z.begin(), z.end(), to);
            v.cross_entropy(to, labels.data(), rows, columns, 0.1f, false, nullptr, losses[k].data());
            v.cross_entropy(to, labels.data(), rows, columns, 0.1f, true, room.data(), losses[k].data() + rows);
            for (int flag = 0; flag < 2; ++flag)
                v.rotate(query.data(), dim, tables.data(), tables.data() + dim, 2, dim, flag, to + size + flag * 2 * dim);
        }
        for (int64_t i = 0; i < 2 * rows; ++i)
            expect(std::fabs(losses[0][i] - losses[1][i]) <= 1e-5, "cross-entropy", rows, columns, block);
        std::vector<float> values[2];
        for (int k = 0; k < 2; ++k)
            for (const T& number : out[k]) values[k].push_back(kept(number));
        close(values, "norm, gate, cross-entropy or rotation", within);
    }

    static void keep(float value, float& to) { to = value; }
    static void keep(float value, uint16_t& to) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        to = static_cast<uint16_t>(bits >> 16);
    }
    static float kept(float value) { return value; }
    static float kept(uint16_t half) {
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }

    // Attention over as many keys as there are rows.
    void check_attention() {
        std::vector<float> out[2];
        const int dim = 32;
        std::vector<float> query(2 * dim), keys(2 * rows * dim);
        for (std::vector<float>* each : {&query, &keys})
            for (float& entry : *each) entry = uniform(-1, 1);
        const int64_t sequence = 0, position = rows - 1;
        for (int k = 0; k < 2; ++k) {
            const Variant& v = k ? neon : scalar;
            out[k].assign(2 * dim, 0);
            v.attend({query.data(), keys.data(), keys.data() + rows * dim, out[k].data(), &sequence, &position, 1, 2, 1, dim,
                      rows, 0.3f},
                     0, 2);
        }
        close(out, "attention");
    }

    // A low-rank update of the rows, as many columns as before.
    void check_update(int64_t rank) {
        std::vector<float> x(size), grad(size), A(rank * columns), Bt(rank * columns), out[2];
        for (std::vector<float>* each : {&x, &grad, &A, &Bt})
            for (float& entry : *each) entry = uniform(-0.2f, 0.2f);
        for (int k = 0; k < 2; ++k) {
            const Variant& v = k ? neon : scalar;
            std::vector<float> room(rank * UPDATE_TOKENS);
            out[k].assign(2 * size + rank * (rows + 2 * columns), 0.5f);
            float *y = out[k].data(), *grad_x = y + size, *low = grad_x + size, *grad_A = low + rank * rows;
            v.update({x.data(), A.data(), Bt.data(), columns, columns, rank, low, y}, 0, rows);
            v.update_backward({grad.data(), x.data(), low, A.data(), Bt.data(), columns, columns, rank, grad_x}, 0, rows,
                              {grad_A, grad_A + rank * columns, room.data()});
        }
        close(out, "low-rank update");
    }

    void close(const std::vector<float>* out, const char* what, float within = 1e-4f) {
        for (size_t i = 0; i < out[0].size(); ++i)
            expect(std::fabs(out[0][i] - out[1][i]) <= within * (1 + std::fabs(out[0][i])), what, rows, columns, block);
    }

    void near(const std::vector<float>* out, const std::vector<float>& x, const std::vector<float>& values, int tokens,
              const char* what) {
        for (int m = 0; m < tokens; ++m)
            for (int64_t r = 0; r < rows; ++r) {
                double size_of_terms = 0;
                for (int64_t i = 0; i < columns; ++i)
                    size_of_terms += std::fabs(static_cast<double>(x[m * columns + i]) * values[r * columns + i]);
                const double difference = std::fabs(static_cast<double>(out[0][m * rows + r]) - out[1][m * rows + r]);
                expect(difference <= 2e-6 * size_of_terms, what, rows, columns, block);
            }
    }
};

}  // namespace

int main() {
    const int64_t blocks[] = {32, 64, 96, 128, 256, 1024, 4096};
    const int64_t wide[] = {32, 64, 96, 127, 576, 1024, 4097, 4128};
    int cases = 0;
    for (const int64_t block : blocks)
        for (int i = 0; i < 60; ++i, ++cases) {
            const int64_t columns = i % 3 == 0 ? wide[whole(0, 7)] : i % 3 == 1 ? 32 * whole(1, 12) : whole(1, 300);
            Case one(whole(1, 9), columns, block, i % 2);
            one.check_quantise(i % 4);
            one.check_quantise8();
            one.check_dequantise();
            one.check_products(static_cast<int>(whole(1, 8)));
            one.check_passes(neon.fp32, scalar.fp32, 1e-4f);
            one.check_passes(neon.bf16, scalar.bf16, 2e-2f);
            one.check_attention();
            one.check_update(whole(1, 13));
        }
    std::vector<float> values(100000), middles(255);
    for (float& x : values) x = uniform(-1.1f, 1.1f);
    for (int i = 0; i < 255; ++i) values[i] = middles[i] = -1 + static_cast<float>(i) / 127;
    std::vector<uint8_t> found[2];
    for (int k = 0; k < 2; ++k) {
        found[k].resize(values.size());
        (k ? neon : scalar).nearest(values.data(), values.size(), middles.data(), found[k].data(), 1);
    }
    expect(same(found[0], found[1]), "nearest", 1, 100000, 0);
    std::printf("NEON equals scalar on %d random weights.\n", cases);
}
