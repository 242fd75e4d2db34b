// The adapted product in bf16, forward and backward, by tiles: y ← [x | low] · [W | scale B]ᵀ, the update being 32
// columns more of the one product. Included by amx.cpp within its unnamed namespace, after amx_panels.h.
//
// A thread has some panels of W to itself. It lays out each once, straight from how W is kept, and multiplies by it as
// many rows as its second cache holds. Rows are read where they are, if they are whole blocks of 32 columns.

namespace veneer {
namespace {

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

// Tiles 0 to 3, rows by columns, ← themselves + so many pairs of tiles of a block, from a pair on, times a panel's.
inline void add4(const Block& block, int64_t from, const uint16_t* panel, int64_t pairs) {
    const uint16_t *rows = block.at(from), *others = rows + block.other;
    const int64_t step = block.pair, bytes = 2 * block.row;
    for (int64_t k = 0; k < pairs; ++k, rows += step, others += step, panel += PAIR) {
        _tile_loadd(6, panel, 64);
        _tile_stream_loadd(4, rows, bytes);  // read once a panel, which stays in the first cache
        _tile_loadd(7, panel + TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_stream_loadd(5, others, bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// A block of rows by the update's thin side (reduced, rank): low (rows, rank), and as tiles behind those of the rows.
inline void thin(const Job& job, const uint16_t* factor, float scale, const Block& rows, int64_t block, uint16_t* behind,
                 uint16_t* low) {
    alignas(64) float sums[32 * 16];
    const __m512 times = _mm512_set1_ps(scale);
    for (int64_t k = 0; k < job.low_blocks * PAIR; k += 32) _mm512_store_si512(behind + k, _mm512_setzero_si512());
    for (int64_t g = 0; g < job.groups; ++g) {
        const uint16_t* panel = factor + g * job.inner * TILE;
        settle();
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t k = 0; k < job.inner; ++k) {
            _tile_loadd(6, panel + k * TILE, 64);
            _tile_loadd(4, rows.at(k), 2 * rows.row);
            _tile_loadd(5, rows.at(k) + rows.other, 2 * rows.row);
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
inline void turned(const Job& job, const uint16_t* behind, int64_t block, uint16_t* to) {
    for (int64_t g = 0; g < job.groups; ++g) {
        uint16_t* tile = to + (g * job.row_blocks + block) * TILE;
        for (int64_t row = 0; row < BLOCK; ++row) {
            const uint16_t* from = behind + g / 2 * PAIR + row / 16 * TILE + row % 16 * 32 + g % 2 * 16;
            for (int64_t r = 0; r < 16; ++r) tile[r * 32 + row] = from[r];
        }
    }
}

// The sums of a block of rows and a panel, rounded into y (tokens, produced); ``past`` the caches or into them.
inline void round_off(const Job& job, const float* sums, const float* bias, int64_t block, int64_t panel, bool past,
                      uint16_t* y) {
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
        if (past)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to), rounded);
        else if (columns >= 32)
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

// A task's panels times its rows, into y.
void multiply_task(const Job& job, const Adapted& a, bool backward, const uint16_t* x, const Room& room, int64_t task,
                   uint16_t* y) {
    const int64_t left = task / job.of_rows * job.at_once, right = smaller(left + job.at_once, job.panels);
    const int64_t of_row = task % job.of_rows;
    const Rows blocks = {job.row_blocks * of_row / job.of_rows, job.row_blocks * (of_row + 1) / job.of_rows,
                         job.row_blocks};
    const float* bias = backward ? nullptr : a.bias;
    const bool past = job.tokens * job.produced > PAST_CACHES && job.produced % 32 == 0 &&
                      reinterpret_cast<uintptr_t>(y) % 64 == 0;
    Panels source(job, a, backward, room.part, right);
    for (int64_t from = 0; from < job.pairs(); from += job.span) {
        const int64_t span = smaller(job.span, job.pairs() - from);
        const bool final = from + span == job.pairs();
        const int64_t own = larger(0, smaller(span, job.inner - from));  // the others are low's
        for (int64_t begin = blocks.first; begin < blocks.last; begin += NEAR) {
            const int64_t end = smaller(begin + NEAR, blocks.last);
            for (int64_t p = left; p < right; ++p) {
                uint16_t* panel = room.panels + (p - left) * job.span * PAIR;
                Fetched fetched;
                if (begin == blocks.first) {
                    source.lay_out(p, from, span, panel);
                    fetched.next = source.next(p, from, span, fetched.lines, fetched.step);
                    fetched.share = fetched.lines / (end - begin) + 1;
                }
                settle();
                for (int64_t block = begin; block < end; ++block) {
                    const int64_t kept =
                        job.span < job.pairs() ? (block - blocks.first) * job.at_once + p - left : 0;
                    float* sums = room.sums + kept * BLOCK * BLOCK;
                    fetched.more();
                    if (final && !past)
                        for (int64_t row = block * BLOCK; row < smaller((block + 1) * BLOCK, job.tokens); ++row)
                            __builtin_prefetch(y + row * job.produced + p * BLOCK, 1, 3);
                    if (from)
                        load4(sums);
                    else
                        clear4();
                    add4(block_of(job, x, room, block), from, panel, own);
                    if (own < span)
                        add4({room.behind + block * job.low_blocks * PAIR}, from + own - job.inner, panel + own * PAIR,
                             span - own);
                    store4(sums);
                    if (!final) continue;
                    settle();
                    round_off(job, sums, bias, block, p, past, y);
                }
            }
        }
    }
    if (past) _mm_sfence();
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

// A block of x (tokens, reduced), if it is not read as it lies.
inline void lay_out_rows(const Job& job, const uint16_t* x, const Room& room, int64_t block) {
    if (!job.laid_out(block)) return;
    uint16_t* to = room.rows + (job.as_they_lie ? 0 : block * job.inner * PAIR);
    row_block(x + block * BLOCK * job.reduced, job.reduced, smaller(BLOCK, job.tokens - block * BLOCK), job.reduced, to);
}

int64_t tiled_room(const Adapted& a, int threads) {
    return larger(Job(a, false, threads).bytes(threads), Job(a, true, threads).bytes(threads));
}

void lay_out(const Adapted& a, const Turn& turn) {
    const Job job(a, false, turn.parts);
    const Room room(job, a.room, turn.part);
    const Tiles tiles;
    if (a.rank) lay_out_factor(job, a.A, false, room.factor);
    for (int64_t block = turn.take(); block < job.row_blocks; block = turn.take()) {
        const Block rows = block_of(job, a.x, room, block);
        uint16_t* behind = room.behind + block * job.low_blocks * PAIR;
        lay_out_rows(job, a.x, room, block);
        if (a.rank) thin(job, room.factor, 1.0f, rows, block, behind, a.low);
    }
}

void multiply(const Adapted& a, const Turn& turn) {
    const Job job(a, false, turn.parts);
    const Room room(job, a.room, turn.part);
    const Tiles tiles;
    for (int64_t task = turn.take(); task < job.tasks(); task = turn.take())
        multiply_task(job, a, false, a.x, room, task, a.y);
}

void lay_out_backward(const AdaptedBackward& b, const Turn& turn) {
    const Adapted& a = b.forward;
    const Job job(a, true, turn.parts);
    const Room room(job, a.room, turn.part);
    const Tiles tiles;
    if (a.rank) lay_out_factor(job, a.B, true, room.factor);
    for (int64_t block = turn.take(); block < job.row_blocks; block = turn.take()) {
        const Block rows = block_of(job, b.grad, room, block);
        uint16_t* behind = room.behind + block * job.low_blocks * PAIR;
        lay_out_rows(job, b.grad, room, block);
        if (!a.rank) continue;
        if (b.grad_B) {  // the forward pass's, in the tiles that its gradient then takes
            const int64_t row = block * BLOCK;
            row_block(a.low + row * a.rank, a.rank, smaller(BLOCK, a.tokens - row), a.rank, behind);
            turned(job, behind, block, room.low);
        }
        thin(job, room.factor, a.scale, rows, block, behind, nullptr);
        if (b.grad_A) turned(job, behind, block, room.grad_low);
    }
}

// The gradients of A and B of 64 columns of x, or behind these of the output's gradient.
void strip_of_factors(const AdaptedBackward& b, const Job& job, const Room& room, int64_t strip) {
    const Adapted& a = b.forward;
    const int64_t of_x = b.grad_A ? blocks_of(a.into, 64) : 0;
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

void multiply_backward(const AdaptedBackward& b, const Turn& turn) {
    const Adapted& a = b.forward;
    const Job job(a, true, turn.parts);
    const Room room(job, a.room, turn.part);
    const Tiles tiles;
    const int64_t of_x = b.grad_x ? job.tasks() : 0;
    const int64_t strips = (b.grad_A ? blocks_of(a.into, 64) : 0) + (b.grad_B ? blocks_of(a.out, 64) : 0);
    for (int64_t task = turn.take(); task < of_x + strips; task = turn.take()) {
        if (task < of_x)
            multiply_task(job, a, true, b.grad, room, task, b.grad_x);
        else
            strip_of_factors(b, job, room, task - of_x);
    }
}

}  // namespace
}  // namespace veneer
