// The adapted product in bf16, forward and backward, by tiles: y ← [x | low] · [W | scale B]ᵀ, the update being 32
// columns more of the one product. Included by amx.cpp within its unnamed namespace, after tiled.h.
//
// A thread has some panels of W to itself. It lays out each once, straight from how W is kept, and multiplies by it as
// many rows as its second cache holds; twelve blocks of a panel at a time, which the first cache does.

namespace veneer {
namespace {

constexpr int64_t CACHED = 640;  // pairs of tiles of rows, 2 KB each
constexpr int64_t DEPTH = 12;    // pairs of tiles of a panel
constexpr int64_t SPAN = 64;     // those of a longer sum that are gone through for all rows before the next ones
constexpr int64_t STRIP = 1 << 18;  // numbers of a weight in codes that are expanded at once, if their rows are many

// What one direction multiplies, and where in the room which part has what.
struct Job {
    int64_t tokens, reduced, produced, rank;
    int64_t row_blocks, inner, low_blocks, groups, panels;
    int64_t span, depth, at_once, strip;  // pairs of tiles; blocks of rows; columns of a part of the weight
    bool along;                     // the weight's rows are what is produced
    int64_t of_panels, of_rows;     // how many parts share the panels, and the rows

    Job(const Adapted& a, bool backward, int parts)
        : tokens(a.tokens), reduced(backward ? a.out : a.into), produced(backward ? a.into : a.out), rank(a.rank),
          row_blocks(blocks_of(tokens)), inner(blocks_of(reduced)), low_blocks(blocks_of(rank)),
          groups(blocks_of(rank, 16)), panels(blocks_of(produced)), along(backward == a.transposed) {
        const int64_t all = inner + low_blocks;
        span = blocks_of(all, blocks_of(all, SPAN));
        depth = blocks_of(span, blocks_of(span, DEPTH));
        of_panels = smaller(parts, panels);
        of_rows = parts / of_panels;
        at_once = larger(1, blocks_of(my_rows(), blocks_of(my_rows(), larger(2, CACHED / span))));
        strip = larger(BLOCK, STRIP / (span * BLOCK) / BLOCK * BLOCK);
    }

    int64_t pairs() const { return inner + low_blocks; }
    int64_t my_rows() const { return blocks_of(row_blocks, of_rows); }
    int64_t my_panels() const { return blocks_of(panels, of_panels); }
    bool in_spans() const { return span < pairs(); }
    int64_t kept_panels() const { return my_rows() > at_once ? my_panels() : 1; }
    int64_t kept_sums() const { return in_spans() ? my_rows() * my_panels() : at_once; }
    // In numbers of bf16, each a multiple of a cache line.
    int64_t for_rows() const { return row_blocks * pairs() * PAIR; }
    int64_t for_low() const { return 2 * groups * row_blocks * TILE; }
    int64_t for_factor() const { return groups * inner * TILE; }
    int64_t for_panels() const { return kept_panels() * span * PAIR; }
    int64_t for_sums() const { return kept_sums() * BLOCK * BLOCK * 2; }
    int64_t for_part() const { return span * BLOCK * (along ? BLOCK : smaller(strip, panels * BLOCK)); }
    int64_t each() const { return for_factor() + for_panels() + for_sums() + (for_part() + 31) / 32 * 32; }
    int64_t bytes(int parts) const { return 2 * (for_rows() + for_low() + parts * each()); }
};

struct Room {
    uint16_t *rows, *low, *grad_low, *factor, *panels, *part;
    float* sums;
    Room(const Job& job, char* room, int part_number) {
        rows = reinterpret_cast<uint16_t*>(room);
        low = rows + job.for_rows();
        grad_low = low + job.for_low() / 2;
        factor = low + job.for_low() + part_number * job.each();
        panels = factor + job.for_factor();
        sums = reinterpret_cast<float*>(panels + job.for_panels());
        part = panels + job.for_panels() + job.for_sums();
    }
};

inline void clear4() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

inline void load4(const float* sums) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
}

inline void store4(float* sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

// Tiles 0 to 3, rows by columns, ← themselves + so many pairs of tiles of rows times those of a panel.
inline void add4(const uint16_t* rows, const uint16_t* panel, int64_t pairs) {
    for (int64_t k = 0; k < pairs; ++k, rows += PAIR, panel += PAIR) {
        _tile_loadd(6, panel, 64);
        _tile_loadd(4, rows, 64);
        _tile_loadd(7, panel + TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, rows + TILE, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// A block of rows by the update's thin side (reduced, rank): low (rows, rank), into its tiles behind those of the rows.
inline void thin(const Job& job, const uint16_t* factor, float scale, int64_t block, uint16_t* tiles, uint16_t* low) {
    alignas(64) float sums[32 * 16];
    const __m512 times = _mm512_set1_ps(scale);
    uint16_t* behind = tiles + job.inner * PAIR;
    for (int64_t k = 0; k < job.low_blocks * PAIR; k += 32) _mm512_store_si512(behind + k, _mm512_setzero_si512());
    for (int64_t g = 0; g < job.groups; ++g) {
        const uint16_t* panel = factor + g * job.inner * TILE;
        settle();
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t k = 0; k < job.inner; ++k) {
            _tile_loadd(6, panel + k * TILE, 64);
            _tile_loadd(4, tiles + k * PAIR, 64);
            _tile_loadd(5, tiles + k * PAIR + TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, sums, 64);
        _tile_stored(1, sums + 256, 64);
        settle();
        const __mmask16 mask = first_of_16(job.rank - g * 16);
        for (int64_t row = 0; row < BLOCK; ++row) {
            const __m512 sum = _mm512_mul_ps(_mm512_load_ps(sums + row * 16), times);
            const __m256i rounded = _mm256_maskz_mov_epi16(mask, (__m256i)_mm512_cvtneps_pbh(sum));
            uint16_t* tile = behind + g / 2 * PAIR + row / 16 * TILE + row % 16 * 32 + g % 2 * 16;
            _mm256_store_si256(reinterpret_cast<__m256i*>(tile), rounded);
            if (low && block * BLOCK + row < job.tokens)
                _mm256_mask_storeu_epi16(low + (block * BLOCK + row) * job.rank + g * 16, mask, rounded);
        }
    }
}

// A block of low (rows, rank) with the tokens along its rows: for each sixteen of the rank a tile.
inline void turned(const Job& job, const uint16_t* tiles_behind, int64_t block, uint16_t* to) {
    for (int64_t g = 0; g < job.groups; ++g) {
        uint16_t* tile = to + (g * job.row_blocks + block) * TILE;
        for (int64_t row = 0; row < BLOCK; ++row) {
            const uint16_t* from = tiles_behind + g / 2 * PAIR + row / 16 * TILE + row % 16 * 32 + g % 2 * 16;
            for (int64_t r = 0; r < 16; ++r) tile[r * 32 + row] = from[r];
        }
    }
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
                const int64_t last = a.weight.kind == Weight16::BF16 ? end : smaller(first + job.strip, end);
                rows = part_of(a.weight, {a.weight.columns, start, stop, first, last}, room);
                begins = first;
                expanded = last;
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

// The sums of a block of rows and a panel, rounded into y (tokens, produced).
inline void round_off(const Job& job, const float* sums, const float* bias, int64_t block, int64_t panel, uint16_t* y) {
    const int64_t first = panel * BLOCK, columns = job.produced - first;
    const int64_t rows = smaller(BLOCK, job.tokens - block * BLOCK);
    __m512 low_bias = _mm512_setzero_ps(), high_bias = low_bias;
    if (bias) {
        low_bias = _mm512_maskz_loadu_ps(first_of_16(columns), bias + first);
        high_bias = _mm512_maskz_loadu_ps(first_of_16(columns - 16), bias + first + 16);
    }
    uint16_t* to = y + block * BLOCK * job.produced + first;
    for (int64_t row = 0; row < rows; ++row, to += job.produced) {
        const float* from = sums + row / 16 * 512 + row % 16 * 16;
        const __m512 low = _mm512_add_ps(_mm512_load_ps(from), low_bias);
        const __m512 high = _mm512_add_ps(_mm512_load_ps(from + 256), high_bias);
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        if (columns >= 32)
            _mm512_storeu_si512(to, rounded);
        else
            _mm512_mask_storeu_epi16(to, first_of_32(columns), rounded);
    }
}

// Lines of memory asked for ahead, a few at a time.
struct Fetched {
    const char* next = nullptr;
    int64_t lines = 0, step = 0, share = 0;
    void more() {
        for (int64_t i = smaller(share, lines); i > 0; --i, --lines, next += step) _mm_prefetch(next, _MM_HINT_T1);
    }
};

// This part's panels times its rows, into y.
void multiply_part(const Job& job, const Adapted& a, bool backward, const Room& room, int part, uint16_t* y) {
    const int64_t of_row = part / job.of_panels;
    if (of_row >= job.of_rows) return;
    const Rows panels = {job.panels * (part % job.of_panels) / job.of_panels,
                         job.panels * (part % job.of_panels + 1) / job.of_panels, job.panels};
    const int64_t first = job.row_blocks * of_row / job.of_rows, last = job.row_blocks * (of_row + 1) / job.of_rows;
    const float* bias = backward ? nullptr : a.bias;
    Panels source(job, a, backward, room.part, panels.last);
    for (int64_t from = 0; from < job.pairs(); from += job.span) {
        const int64_t span = smaller(job.span, job.pairs() - from);
        for (int64_t begin = first; begin < last; begin += job.at_once) {
            const int64_t end = smaller(begin + job.at_once, last);
            for (int64_t p = panels.first; p < panels.last; ++p) {
                const int64_t mine = p - panels.first;
                uint16_t* panel = room.panels + (job.kept_panels() > 1 ? mine : 0) * job.span * PAIR;
                Fetched fetched;
                if (begin == first) {
                    source.lay_out(p, from, span, panel);
                    fetched.next = source.next(p, from, span, fetched.lines, fetched.step);
                    fetched.share = fetched.lines / ((end - begin) * blocks_of(span, job.depth)) + 1;
                }
                settle();
                for (int64_t k = 0; k < span; k += job.depth) {
                    const int64_t pairs = smaller(job.depth, span - k);
                    const bool final = from + k + pairs == job.pairs();
                    for (int64_t block = begin; block < end; ++block) {
                        const int64_t kept = job.in_spans() ? mine * job.my_rows() + block - first : block - begin;
                        float* sums = room.sums + kept * BLOCK * BLOCK;
                        fetched.more();
                        if (final)
                            for (int64_t row = block * BLOCK; row < smaller((block + 1) * BLOCK, job.tokens); ++row)
                                __builtin_prefetch(y + row * job.produced + p * BLOCK, 1, 3);
                        if (from + k)
                            load4(sums);
                        else
                            clear4();
                        add4(room.rows + (block * job.pairs() + from + k) * PAIR, panel + k * PAIR, pairs);
                        store4(sums);
                        if (!final) continue;
                        settle();
                        round_off(job, sums, bias, block, p, y);
                    }
                }
            }
        }
    }
}

// Σ over the tokens of lowᵀ · rows: (rank, columns) for 64 columns of rows (tokens, width), of each sixteen of the rank
// handed to ``take(first of the rank, sums (16, 64))``.
template <class Take>
void sum_over_tokens(const Job& job, const uint16_t* low, const uint16_t* rows, int64_t width, int64_t first,
                     const Take& take) {
    alignas(64) uint16_t pairs[4 * TILE];
    alignas(64) float sums[16 * 64];
    const int64_t columns = width - first;
    for (int64_t g = 0; g < job.groups; ++g) {
        clear4();
        for (int64_t block = 0; block < job.row_blocks; ++block) {
            const int64_t there = smaller(BLOCK, job.tokens - block * BLOCK);
            const uint16_t* from = rows + block * BLOCK * width + first;
            for (int64_t row = 0; row < BLOCK; row += 2)
                for (int64_t half = 0; half < 2; ++half) {
                    const auto of = [&](int64_t at) {
                        return at < there ? some(from + at * width + half * 32, columns - half * 32)
                                          : _mm512_setzero_si512();
                    };
                    uint16_t* to = pairs + half * PAIR + row / 2 * 32;
                    interleave(of(row), of(row + 1), to, to + TILE);
                }
            settle();
            _tile_loadd(4, low + (g * job.row_blocks + block) * TILE, 64);
            _tile_loadd(5, pairs, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, pairs + TILE, 64);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, pairs + 2 * TILE, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, pairs + 3 * TILE, 64);
            _tile_dpbf16ps(3, 4, 5);
            settle();
        }
        _tile_stored(0, sums, 256);
        _tile_stored(1, sums + 16, 256);
        _tile_stored(2, sums + 32, 256);
        _tile_stored(3, sums + 48, 256);
        settle();
        take(g * 16, sums);
    }
}

int64_t tiled_room(const Adapted& a, int threads) {
    return larger(Job(a, false, threads).bytes(threads), Job(a, true, threads).bytes(threads));
}

void lay_out(const Adapted& a, int part, int parts) {
    const Job job(a, false, parts);
    const Room room(job, a.room, part);
    const Tiles tiles;
    if (a.rank) lay_out_factor(job, a.A, false, room.factor);
    for (int64_t block = job.row_blocks * part / parts; block < job.row_blocks * (part + 1) / parts; ++block) {
        uint16_t* to = room.rows + block * job.pairs() * PAIR;
        const int64_t row = block * BLOCK;
        row_block(a.x + row * a.into, a.into, smaller(BLOCK, a.tokens - row), a.into, to);
        if (a.rank) thin(job, room.factor, 1.0f, block, to, a.low);
    }
}

void multiply(const Adapted& a, int part, int parts) {
    const Job job(a, false, parts);
    const Tiles tiles;
    multiply_part(job, a, false, Room(job, a.room, part), part, a.y);
}

void lay_out_backward(const AdaptedBackward& b, int part, int parts) {
    const Adapted& a = b.forward;
    const Job job(a, true, parts);
    const Room room(job, a.room, part);
    const Tiles tiles;
    if (a.rank) lay_out_factor(job, a.B, true, room.factor);
    for (int64_t block = job.row_blocks * part / parts; block < job.row_blocks * (part + 1) / parts; ++block) {
        uint16_t* to = room.rows + block * job.pairs() * PAIR;
        const int64_t row = block * BLOCK, rows = smaller(BLOCK, a.tokens - row);
        row_block(b.grad + row * a.out, a.out, rows, a.out, to);
        if (!a.rank) continue;
        if (b.grad_B) {  // the forward pass's, in the tiles that its gradient then takes
            row_block(a.low + row * a.rank, a.rank, rows, a.rank, to + job.inner * PAIR);
            turned(job, to + job.inner * PAIR, block, room.low);
        }
        thin(job, room.factor, a.scale, block, to, nullptr);
        if (b.grad_A) turned(job, to + job.inner * PAIR, block, room.grad_low);
    }
}

void multiply_backward(const AdaptedBackward& b, int part, int parts) {
    const Adapted& a = b.forward;
    const Job job(a, true, parts);
    const Room room(job, a.room, part);
    const Tiles tiles;
    if (b.grad_x) multiply_part(job, a, true, room, part, b.grad_x);
    const int64_t of_x = b.grad_A ? blocks_of(a.into, 64) : 0, of_grad = b.grad_B ? blocks_of(a.out, 64) : 0;
    for (int64_t strip = (of_x + of_grad) * part / parts; strip < (of_x + of_grad) * (part + 1) / parts; ++strip) {
        const bool for_A = strip < of_x;
        const int64_t width = for_A ? a.into : a.out, first = (for_A ? strip : strip - of_x) * 64;
        const int64_t columns = smaller(64, width - first);
        sum_over_tokens(job, for_A ? room.grad_low : room.low, for_A ? a.x : b.grad, width, first,
                        [&](int64_t r, const float* sums) {
                            for (int64_t i = 0; i < smaller(16, a.rank - r); ++i)
                                for (int64_t c = 0; c < columns; ++c) {
                                    if (for_A)
                                        b.grad_A[(r + i) * width + first + c] = sums[i * 64 + c];
                                    else
                                        b.grad_B[(first + c) * a.rank + r + i] = a.scale * sums[i * 64 + c];
                                }
                        });
    }
}

}  // namespace
}  // namespace veneer
