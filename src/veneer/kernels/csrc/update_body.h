// The low-rank update's products of some tokens, forward and backward, written once. Included after passes_body.h, within
// each variant's own unnamed namespace as that is. Their short side, the rank, is held in registers, so that what a few
// tokens have in a layer goes through the cache once, where matrix products one after another go through it four times.

namespace veneer {
namespace {

constexpr int TOKENS = REGISTER == 16 ? 4 : 2;  // at a time, which with as many of the rank's rows fill the registers
constexpr int TILE = TOKENS;

// low (T, rank) ← rows (T, width) · Mᵀ of M (R, width), rows of M being the next R of the rank.
template <int T, int R>
void dots(const float* rows, const float* M, int64_t width, int64_t rank, float* low) {
    Lanes sums[T][R] = {};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        Lanes x[T], m;
        for (int t = 0; t < T; ++t) load(x[t], rows + t * width + i);
        for (int r = 0; r < R; ++r) {
            load(m, M + r * width + i);
            for (int t = 0; t < T; ++t) add_product(sums[t][r], x[t], m);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) {
            float sum = total(sums[t][r]);
            for (int64_t k = i; k < width; ++k) sum += rows[t * width + k] * M[r * width + k];
            low[t * rank + r] = sum;
        }
}

// low (T, rank) ← rows (T, width) · Mᵀ of M (rank, width).
template <int T>
void all_dots(const float* rows, const float* M, int64_t width, int64_t rank, float* low) {
    int64_t r = 0;
    for (; r + TILE <= rank; r += TILE) dots<T, TILE>(rows, M + r * width, width, rank, low + r);
    for (; r + 2 <= rank; r += 2) dots<T, 2>(rows, M + r * width, width, rank, low + r);
    for (; r < rank; ++r) dots<T, 1>(rows, M + r * width, width, rank, low + r);
}

// rows (T, width) ← rows + low (T, rank) · M (rank, width).
template <int T>
void add_low(const float* low, const float* M, int64_t width, int64_t rank, float* rows) {
    int64_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) {
        Lanes sums[T][2], m[2];
        for (int t = 0; t < T; ++t)
            for (int c = 0; c < 2; ++c) load(sums[t][c], rows + t * width + i + c * LANES);
        for (int64_t r = 0; r < rank; ++r) {
            for (int c = 0; c < 2; ++c) load(m[c], M + r * width + i + c * LANES);
            for (int t = 0; t < T; ++t)
                for (int c = 0; c < 2; ++c) add_product(sums[t][c], m[c], low[t * rank + r]);
        }
        for (int t = 0; t < T; ++t)
            for (int c = 0; c < 2; ++c) store(sums[t][c], rows + t * width + i + c * LANES);
    }
    for (; i < width; ++i)
        for (int t = 0; t < T; ++t) {
            float sum = rows[t * width + i];
            for (int64_t r = 0; r < rank; ++r) sum += low[t * rank + r] * M[r * width + i];
            rows[t * width + i] = sum;
        }
}

// sums (rank, width) ← sums + lowᵀ · rows of low (T, rank) and rows (T, width).
template <int T>
void add_outer(const float* low, const float* rows, int64_t width, int64_t rank, float* sums) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        Lanes x[T];
        for (int t = 0; t < T; ++t) load(x[t], rows + t * width + i);
        for (int64_t r = 0; r < rank; ++r) {
            Lanes sum;
            load(sum, sums + r * width + i);
            for (int t = 0; t < T; ++t) add_product(sum, x[t], low[t * rank + r]);
            store(sum, sums + r * width + i);
        }
    }
    for (; i < width; ++i)
        for (int64_t r = 0; r < rank; ++r)
            for (int t = 0; t < T; ++t) sums[r * width + i] += low[t * rank + r] * rows[t * width + i];
}

template <int T>
void update_of(const Updated& u, int64_t token) {
    float* low = u.low + token * u.rank;
    all_dots<T>(u.x + token * u.into, u.A, u.into, u.rank, low);
    add_low<T>(low, u.Bt, u.out, u.rank, u.y + token * u.out);
}

void update(const Updated& u, int64_t first, int64_t last) {
    for (; first + TOKENS <= last; first += TOKENS) update_of<TOKENS>(u, first);
    for (; first < last; ++first) update_of<1>(u, first);
}

// Of G groups of T tokens: sums of many tokens at once are fetched and stored less often.
template <int G, int T>
void update_backward_of(const UpdateBackward& u, int64_t token, const UpdateSums& sums) {
    const float *grad = u.grad + token * u.out, *x = u.x + token * u.into;
    for (int t = 0; t < G * T; t += T) all_dots<T>(grad + t * u.out, u.Bt, u.out, u.rank, sums.room + t * u.rank);
    add_outer<G * T>(u.low + token * u.rank, grad, u.out, u.rank, sums.grad_Bt);
    add_outer<G * T>(sums.room, x, u.into, u.rank, sums.grad_A);
    for (int t = 0; u.grad_x && t < G * T; t += T)
        add_low<T>(sums.room + t * u.rank, u.A, u.into, u.rank, u.grad_x + (token + t) * u.into);
}

void update_backward(const UpdateBackward& u, int64_t first, int64_t last, const UpdateSums& sums) {
    constexpr int MANY = 2 * TOKENS;
    static_assert(MANY <= UPDATE_TOKENS, "there is room for them");
    for (; first + MANY <= last; first += MANY) update_backward_of<2, TOKENS>(u, first, sums);
    for (; first < last; ++first) update_backward_of<1, 1>(u, first, sums);
}

}  // namespace
}  // namespace veneer
