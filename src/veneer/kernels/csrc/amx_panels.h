// What a product in bf16 by tiles multiplies, how its sides become tiles, and where in the room they are. Included by
// amx.cpp within its unnamed namespace, after tiled.h.

namespace veneer {
namespace {

constexpr int64_t SPAN = 64;   // pairs of tiles, 2 KB each, of a longer sum that all rows go through before the next ones
constexpr int64_t GROUP = 4;   // panels of a task, at most: what it writes of a row is then 256 bytes in one piece
constexpr int64_t NEAR = 4;    // blocks of rows that a panel multiplies while it is in the first cache
constexpr int64_t TASKS = 3;   // a thread, at least, so that a slow one keeps nobody waiting
constexpr int64_t PAST_CACHES = 1 << 20;  // numbers of an output from which on it is written around the caches
constexpr int64_t WORTH_A_TASK = 8;  // blocks of rows that a panel is laid out for, at least

// What one direction multiplies, in which tasks, and where in the room which thread has what.
struct Job {
    int64_t tokens, reduced, produced, rank;
    int64_t row_blocks, inner, low_blocks, groups, panels;
    int64_t span;                  // pairs of tiles
    int64_t at_once, of_rows;      // panels of a task; into how many tasks the rows are cut
    bool along;                    // the weight's rows are what is produced
    bool as_they_lie;              // rows are read where they are, but for a last block that is not full

    Job(const Adapted& a, bool backward, int parts)
        : tokens(a.tokens), reduced(backward ? a.out : a.into), produced(backward ? a.into : a.out), rank(a.rank),
          row_blocks(blocks_of(tokens)), inner(blocks_of(reduced)), low_blocks(blocks_of(rank)),
          groups(blocks_of(rank, 16)), panels(blocks_of(produced)), along(backward == a.transposed),
          as_they_lie(reduced % BLOCK == 0) {
        span = blocks_of(pairs(), blocks_of(pairs(), SPAN));
        at_once = larger(1, smaller(GROUP, panels / (TASKS * parts)));
        of_rows = larger(1, smaller(blocks_of(TASKS * parts, of_panels()), row_blocks / WORTH_A_TASK));
    }

    int64_t pairs() const { return inner + low_blocks; }
    int64_t of_panels() const { return blocks_of(panels, at_once); }
    int64_t tasks() const { return of_panels() * of_rows; }
    int64_t kept_sums() const { return span < pairs() ? at_once * blocks_of(row_blocks, of_rows) : 1; }
    // In numbers of bf16, each a multiple of a cache line.
    bool laid_out(int64_t block) const { return !as_they_lie || (block + 1) * BLOCK > tokens; }
    int64_t for_rows() const { return (as_they_lie ? 1 : row_blocks) * inner * PAIR; }
    int64_t for_behind() const { return row_blocks * low_blocks * PAIR; }
    int64_t for_low() const { return 2 * groups * row_blocks * TILE; }
    int64_t for_factor() const { return groups * inner * TILE; }
    int64_t for_panels() const { return at_once * span * PAIR; }
    int64_t for_sums() const { return kept_sums() * BLOCK * BLOCK * 2; }
    int64_t for_part() const { return span * BLOCK * (along ? BLOCK : at_once * BLOCK); }
    int64_t each() const { return for_factor() + for_panels() + for_sums() + (for_part() + 31) / 32 * 32; }
    int64_t bytes(int parts) const { return 2 * (for_rows() + for_behind() + for_low() + parts * each()); }
};

struct Room {
    uint16_t *rows, *behind, *low, *grad_low, *factor, *panels, *part;
    float* sums;
    Room(const Job& job, char* room, int part_number) {
        rows = reinterpret_cast<uint16_t*>(room);
        behind = rows + job.for_rows();
        low = behind + job.for_behind();
        grad_low = low + job.for_low() / 2;
        factor = low + job.for_low() + part_number * job.each();
        panels = factor + job.for_factor();
        sums = reinterpret_cast<float*>(panels + job.for_panels());
        part = panels + job.for_panels() + job.for_sums();
    }
};

// A block of rows: where its first tile is, and how far on the next pair, a pair's other tile and a tile's next row.
struct Block {
    const uint16_t* first;
    int64_t pair = PAIR, other = TILE, row = 32;
    const uint16_t* at(int64_t k) const { return first + k * pair; }
};

inline Block block_of(const Job& job, const uint16_t* x, const Room& room, int64_t block) {
    if (job.laid_out(block)) return {room.rows + (job.as_they_lie ? 0 : block * job.inner * PAIR)};
    return {x + block * BLOCK * job.reduced, BLOCK, 16 * job.reduced, job.reduced};
}

// The update's thin side as a panel of sixteen columns for each sixteen of the rank: A (rank, reduced), or, ``across``,
// B (reduced, rank).
void lay_out_factor(const Job& job, const float* factor, bool across, uint16_t* to) {
    for (int64_t g = 0; g < job.groups; ++g) {
        uint16_t* panel = to + g * job.inner * TILE;
        if (!across) {
            const float* rows = factor + g * 16 * job.reduced;
            half_of_rows(job.rank - g * 16, job.reduced,
                         [&](int64_t row, int64_t c) { return some(rows + row * job.reduced + c, job.reduced - c); },
                         panel, TILE);
            continue;
        }
        for (int64_t row = 0; row < job.inner * BLOCK; row += 2) {
            const auto sixteen = [&](int64_t at) {
                const __mmask16 mask = at < job.reduced ? first_of_16(job.rank - g * 16) : 0;
                return _mm512_cvtepu16_epi32(
                    (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, factor + at * job.rank + g * 16)));
            };
            const __m512i pairs = _mm512_or_si512(sixteen(row), _mm512_slli_epi32(sixteen(row + 1), 16));
            _mm512_store_si512(panel + row / BLOCK * TILE + row % BLOCK / 2 * 32, pairs);
        }
    }
}

// Rows of bf16 that stand for part of the weight: as it is kept, or expanded.
struct Rows16 {
    const uint16_t* at;
    int64_t stride;
};

Rows16 part_of(const Weight16& w, const Piece& piece, uint16_t* to) {
    const int64_t width = piece.last - piece.first;
    switch (w.kind) {
        case Weight16::BF16:
            return {static_cast<const uint16_t*>(w.values) + piece.first_row * w.stride + piece.first, w.stride};
        case Weight16::CODES4: avx512.dequantise_part(w.packed, piece, to); break;
        case Weight16::CODES8: avx512.dequantise8_part(w.packed, piece, to); break;
        default:
            for (int64_t row = piece.first_row; row < piece.last_row; ++row)
                for (int64_t c = 0; c < width; c += 32) {
                    const int64_t at = row * w.stride + piece.first + c;
                    const __m512i found = w.kind == Weight16::FP32
                        ? some(static_cast<const float*>(w.values) + at, width - c)
                        : some_halves(static_cast<const uint16_t*>(w.values) + at, width - c);
                    _mm512_mask_storeu_epi16(to + (row - piece.first_row) * width + c, first_of_32(width - c), found);
                }
    }
    return {to, width};
}

// The panels of the weight, one after another, each with the update's wide side below it.
class Panels {
public:
    Panels(const Job& job, const Adapted& a, bool backward, uint16_t* room, int64_t end)
        : job(job), a(a), backward(backward), room(room), end(smaller(end * BLOCK, job.produced)) {}

    // Of the sum from pair of tiles ``from`` on, so many pairs.
    void lay_out(int64_t panel, int64_t from, int64_t pairs, uint16_t* to) {
        const int64_t first = panel * BLOCK, columns = smaller(BLOCK, job.produced - first);
        const int64_t start = from * BLOCK, stop = smaller((from + pairs) * BLOCK, job.reduced);
        if (job.along) {
            const Rows16 rows = part_of(a.weight, {a.weight.columns, first, first + columns, start, stop}, room);
            for (int64_t half = 0; half < 2; ++half)
                half_of_rows(columns - half * 16, stop - start,
                             [&](int64_t row, int64_t c) {
                                 return some(rows.at + (half * 16 + row) * rows.stride + c, stop - start - c);
                             },
                             to + half * TILE, PAIR);
        } else {
            if (first >= expanded || from != began) {
                rows = part_of(a.weight, {a.weight.columns, start, stop, first, end}, room);
                begins = first;
                expanded = end;
                began = from;
            }
            const uint16_t* at = rows.at + first - begins;
            panel_of_rows(stop - start, [&](int64_t row) { return some(at + row * rows.stride, columns); }, to);
        }
        if (job.rank && from + pairs == job.pairs()) below(first, columns, to + (job.inner - from) * PAIR);
    }

    // Where the next panel's values are: lines to fetch while this one is multiplied by.
    const char* next(int64_t panel, int64_t from, int64_t pairs, int64_t& lines, int64_t& step) const {
        lines = 0;
        step = 64;
        const int64_t first = (panel + 1) * BLOCK, start = from * BLOCK;
        const int64_t reduced = smaller((from + pairs) * BLOCK, job.reduced) - start;
        if (first >= end) return nullptr;
        const char* values = static_cast<const char*>(a.weight.values);
        if (a.weight.kind == Weight16::BF16 && !job.along) {
            lines = reduced;
            step = 2 * a.weight.stride;
            return values + 2 * (start * a.weight.stride + first);
        }
        if (a.weight.kind == Weight16::BF16 && reduced == a.weight.stride) {
            lines = smaller(BLOCK, job.produced - first) * reduced / 32;
            return values + 2 * first * reduced;
        }
        if (a.weight.kind == Weight16::CODES4 && job.along && reduced == a.weight.columns) {
            lines = smaller(BLOCK, job.produced - first) * reduced / 128;
            return reinterpret_cast<const char*>(a.weight.packed.codes) + first * reduced / 2;
        }
        return nullptr;
    }

private:
    // B (out, rank), times the scale, rows being columns; backward A (rank, into).
    void below(int64_t first, int64_t columns, uint16_t* to) const {
        if (backward) {
            panel_of_rows(job.rank, [&](int64_t row) { return some(a.A + row * job.produced + first, columns); }, to);
            return;
        }
        for (int64_t half = 0; half < 2; ++half)
            half_of_rows(columns - half * 16, job.rank,
                         [&](int64_t row, int64_t c) {
                             return some(a.B + (first + half * 16 + row) * job.rank + c, job.rank - c, a.scale);
                         },
                         to + half * TILE, PAIR);
    }

    const Job& job;
    const Adapted& a;
    const bool backward;
    uint16_t* room;
    const int64_t end;
    int64_t begins = 0, expanded = 0, began = -1;  // columns that are expanded, and from which pair of tiles on
    Rows16 rows{};
};

}  // namespace
}  // namespace veneer
