// IQ1_S and IQ1_M: groups of eight weights on a grid of eight dimensions with the levels -1, 0 and 1, all shifted by
// DELTA up or down: those of a block in IQ1_S, of a group in IQ1_M (quantize_row_iq1_*_impl in ggml-quants.c).
#include "cuts.h"
#include "eight.h"
#include "grid_blocks.h"

namespace {

constexpr float DELTA = 0.125f;
constexpr float UP[3] = {-1 + DELTA, DELTA, 1 + DELTA}, DOWN[3] = {-1 - DELTA, -DELTA, 1 - DELTA};

struct S {
    static constexpr GridName NAME = GridName::iq1;
    static constexpr int N = 32;
    static constexpr float EMPTY = 1e-12f, SIGMA = 2.0f;
    static constexpr bool WEIGHTED = true, ROOTS = false;
    static F unweighted(F, F v) { return v; }
};
struct Mixed {
    static constexpr GridName NAME = GridName::iq1;
    static constexpr int N = 16;
    static constexpr float EMPTY = 1e-7f, SIGMA = 2.0f;
    static constexpr bool WEIGHTED = false, ROOTS = false;
    static F unweighted(F, F v) { return v * v; }
};

struct Sorted {
    float x[48], w[48];   // prefix sums of w * x and of w over the sorted weights
};

// ---------------------------------------------------------------------------------------------------- IQ1_S

INLINE Cut best_cut_s(const Block &b, const Sorted &sum) {
    constexpr int N = S::N;
    const auto one = [&](int i1, int i2) {
        Sums<float, 2> s;
        for (int way = 0; way < 2; way++) {
            const float *const q = way ? DOWN : UP;
            s.qx[way] = (sum.x[i1] - sum.x[0]) * q[0] + (sum.x[i2] - sum.x[i1]) * q[1] + (sum.x[N] - sum.x[i2]) * q[2];
            s.q2[way] = (sum.w[i1] - sum.w[0]) * q[0] * q[0] + (sum.w[i2] - sum.w[i1]) * q[1] * q[1] +
                        (sum.w[N] - sum.w[i2]) * q[2] * q[2];
        }
        return s;
    };
    // The parts of the sums from the weights before the first place and after the second.
    alignas(64) float before_x[2][N + 16], before_w[2][N + 16];
    F x2[N / W], w2[N / W], behind_x[2][N / W], behind_w[2][N / W];
    for (int v = 0; v < N / W; v++) {
        x2[v] = loadu(sum.x + 1 + v * W), w2[v] = loadu(sum.w + 1 + v * W);
        const F x = vec(sum.x[N]) - x2[v], w = vec(sum.w[N]) - w2[v];
        for (int way = 0; way < 2; way++) {
            const float *const q = way ? DOWN : UP;
            storeu(before_x[way] + 1 + v * W, x2[v] * vec(q[0]));
            storeu(before_w[way] + 1 + v * W, w2[v] * vec(q[0]) * vec(q[0]));
            before_x[way][0] = 0 * q[0], before_w[way][0] = 0;
            behind_x[way][v] = x * vec(q[2]);
            behind_w[way][v] = w * vec(q[2]) * vec(q[2]);
        }
    }
    const auto some = [&](int i1, int i2) {
        const int v = i2 / W;
        // DELTA is a power of two: the middle part for levels shifted down is this one with the other sign.
        const F x = (x2[v] - vec(sum.x[i1])) * vec(DELTA), w = (w2[v] - vec(sum.w[i1])) * vec(DELTA) * vec(DELTA);
        return Sums<F, 2>{{vec(before_x[0][i1]) + x + behind_x[0][v], vec(before_x[1][i1]) - x + behind_x[1][v]},
                          {vec(before_w[0][i1]) + w + behind_w[0][v], vec(before_w[1][i1]) + w + behind_w[1][v]}};
    };
    return best_cut<N, 2>(b.x, b.largest, sum.w[N], one, some);
}

// ---------------------------------------------------------------------------------------------------- IQ1_M

// The ways to shift the levels of two groups of eight: each up or down.
constexpr int WAYS = 4;
INLINE bool is_up(int way, int group) { return group ? way % 2 == 0 : way < 2; }

// ggml's constants for levels shifted up and down.
constexpr float TOP[2] = {UP[2], DOWN[2]};
constexpr float C1[2] = {UP[0] * UP[0] - UP[1] * UP[1], DOWN[0] * DOWN[0] - DOWN[1] * DOWN[1]};
constexpr float C2[2] = {UP[1] * UP[1] - UP[2] * UP[2], DOWN[1] * DOWN[1] - DOWN[2] * DOWN[2]};

// The sums of the block from those of both groups, for either way to shift them.
template <class V>
INLINE Sums<V, WAYS> together(const V (&qx)[2][2], const V (&q2)[2][2]) {
    Sums<V, WAYS> s;
    for (int way = 0; way < WAYS; way++) {
        s.qx[way] = qx[0][way / 2] + qx[1][way % 2];
        s.q2[way] = q2[0][way / 2] + q2[1][way % 2];
    }
    return s;
}

INLINE Cut best_cut_m(const Block &b, const Sorted (&sum)[2]) {
    constexpr int N = Mixed::N;
    const auto one = [&](int i1, int i2) {
        float qx[2][2], q2[2][2];
        for (int h = 0; h < 2; h++) {
            const float sx = sum[h].x[i1] + sum[h].x[i2];
            for (int d = 0; d < 2; d++) {
                qx[h][d] = sum[h].x[N] * TOP[d] - sx;
                q2[h][d] = sum[h].w[N] * TOP[d] * TOP[d] + sum[h].w[i1] * C1[d] + sum[h].w[i2] * C2[d];
            }
        }
        return together(qx, q2);
    };
    // The terms that do not depend on the second place, and those that do not depend on the first.
    alignas(64) float first_w[2][2][N + 16];
    F x2[2][N / W], w2[2][2][N / W], all_x[2][2];
    for (int h = 0; h < 2; h++) {
        for (int d = 0; d < 2; d++) {
            const float all_w = sum[h].w[N] * TOP[d] * TOP[d];
            all_x[h][d] = vec(sum[h].x[N] * TOP[d]);
            first_w[h][d][0] = all_w + sum[h].w[0] * C1[d];
            for (int v = 0; v < N / W; v++) {
                const F w = loadu(sum[h].w + 1 + v * W);
                storeu(first_w[h][d] + 1 + v * W, vec(all_w) + w * vec(C1[d]));
                w2[h][d][v] = w * vec(C2[d]);
            }
        }
        for (int v = 0; v < N / W; v++) x2[h][v] = loadu(sum[h].x + 1 + v * W);
    }
    const auto some = [&](int i1, int i2) {
        const int v = i2 / W;
        F qx[2][2], q2[2][2];
        for (int h = 0; h < 2; h++) {
            const F sx = vec(sum[h].x[i1]) + x2[h][v];
            for (int d = 0; d < 2; d++) {
                qx[h][d] = all_x[h][d] - sx;
                q2[h][d] = vec(first_w[h][d][i1]) + w2[h][d][v];
            }
        }
        return together(qx, q2);
    };
    return best_cut<N, WAYS>(b.x, b.largest, sum[0].w[N] + sum[1].w[N], one, some);
}

// ---------------------------------------------------------------------------------------------------- both

// The points of a block with the best cut, and their scale. `ways[k]` holds the values of group k's levels. Returns false
// where ggml would abort.
template <class T>
INLINE bool points(const Grid &g, const Block &b, const int32_t *rank, const Cut &cut, float scale,
                   const float *const *ways, Done &done) {
    uint32_t ones = 0, twos = 0;   // which weights have a level of at least 1, and of 2
    for (int i = 0; i < T::N; i += W) {
        const I r = load(rank + i);
        ones |= bits(r > vec(cut.first - 1)) << i;
        twos |= bits(r > vec(cut.second - 1)) << i;
    }
    if (cut.scale < 0) {   // reversed: level 2 becomes level 0
        const uint32_t were_ones = ones;
        ones = ~twos, twos = ~were_ones;
    }
    uint32_t word[T::N / 8];
    bool moved = false;
    for (int k = 0; k < T::N / 8; k++) {
        const Cell cell = g.cells[POWERS.of[ones >> 8 * k & 255] + POWERS.of[twos >> 8 * k & 255]];
        word[k] = g.words[cell.first];
        done.point[k] = static_cast<uint16_t>(cell.first);
        if (!cell.count) continue;
        moved = true;
        const F levels = level_table(ways[k][0], ways[k][1], ways[k][2]);
        if (!nearest_point(g.words + cell.first, cell.count, eight(b.x + 8 * k, b.w + 8 * k), levels, scale, word + k)) {
            return false;
        }
        done.point[k] = static_cast<uint16_t>(g.cells[code_of_word(word[k])].first);
    }
    done.scale = scale;
    if (moved) {
        float sumqx = 0, sumq2 = 0;
        for (int i = 0; i < T::N; i++) {
            const float wq = b.w[i] * ways[i / 8][word[i / 8] >> 4 * (i % 8) & 3];
            sumqx += wq * b.x[i];
            sumq2 += wq * ways[i / 8][word[i / 8] >> 4 * (i % 8) & 3];
        }
        if (sumqx > 0 && sumq2 > 0) done.scale = sumqx / sumq2;
    }
    return done.scale >= 0;
}

// A block of zeros, or of weights that do not count.
INLINE void nothing(Done &done) {
    done.scale = 0;
    for (int k = 0; k < 4; k++) done.point[k] = 0;
}

template <class T>
INLINE bool prepare(const float *x, const float *weights, float sigma2, Block &b, int32_t *rank) {
    if (!weigh<T>(x, weights, sigma2, b)) return false;
    F most = vec(0.0f);
    for (int i = 0; i < T::N; i += W) {
        const F v = loadu(x + i);
        store(b.x + i, v);
        store(b.wx + i, load(b.w + i) * v);
        most = max_(abs(v), most);
    }
    for (int i = T::N; i < 48; i++) b.x[i] = b.w[i] = 0;
    b.largest = largest_of(most);
    if (!(b.largest < T::EMPTY)) ranks<T::N>(b.x, rank);
    return true;
}

INLINE bool quantize_s(const Grid &g, const float *x, const float *weights, float sigma2, Done &done) {
    Block b;
    alignas(64) int32_t rank[S::N];
    nothing(done);
    done.signs[0] = 0;
    if (!prepare<S>(x, weights, sigma2, b, rank)) return false;
    if (b.largest < S::EMPTY) return true;
    float wx[S::N], w[S::N];
    for (int i = 0; i < S::N; i++) wx[rank[i]] = b.wx[i], w[rank[i]] = b.w[i];
    Sorted sum;
    sum.x[0] = sum.w[0] = 0;
    for (int j = 0; j < S::N; j++) sum.x[j + 1] = sum.x[j] + wx[j], sum.w[j + 1] = sum.w[j] + w[j];
    const Cut cut = best_cut_s(b, sum);
    if (cut.first < 0) return true;
    const bool up = (cut.way == 0) == (cut.scale >= 0);
    done.signs[0] = !up;
    const float *const grid = up ? UP : DOWN, *const ways[4] = {grid, grid, grid, grid};
    return points<S>(g, b, rank, cut, cut.scale < 0 ? -cut.scale : cut.scale, ways, done);
}

INLINE bool quantize_m(const Grid &g, const float *x, const float *weights, float sigma2, Done &done) {
    constexpr int N = Mixed::N;
    Block b;
    alignas(64) int32_t rank[N];
    nothing(done);
    done.signs[0] = 0;
    if (!prepare<Mixed>(x, weights, sigma2, b, rank)) return false;
    if (b.largest < Mixed::EMPTY) return true;
    // The prefix sums of one group do not change at a weight of the other group.
    float wx[2][N] = {}, w[2][N] = {};
    for (int i = 0; i < N; i++) wx[i / 8][rank[i]] = b.wx[i], w[i / 8][rank[i]] = b.w[i];
    Sorted sum[2];
    for (int h = 0; h < 2; h++) sum[h].x[0] = sum[h].w[0] = 0;
    for (int j = 0; j < N; j++) {
        for (int h = 0; h < 2; h++) {
            sum[h].x[j + 1] = sum[h].x[j] + wx[h][j];
            sum[h].w[j + 1] = sum[h].w[j] + w[h][j];
        }
    }
    const Cut cut = best_cut_m(b, sum);
    if (cut.first < 0) return true;
    const int way = cut.scale < 0 ? WAYS - 1 - cut.way : cut.way;
    done.signs[0] = static_cast<uint8_t>(way);
    const float *const ways[2] = {is_up(way, 0) ? UP : DOWN, is_up(way, 1) ? UP : DOWN};
    return points<Mixed>(g, b, rank, cut, cut.scale < 0 ? -cut.scale : cut.scale, ways, done);
}

INLINE void pack_s(const Super &s, Counts &, uint8_t *out) {
    const float d = s.largest / 15, id = 1 / d;
    const uint16_t stored = s.largest == 0 ? 0 : half(d * 1.125f);
    std::memcpy(out, &stored, 2);
    for (int b = 0; b < 8; b++) {
        unsigned high = 0;
        for (int k = 0; k < 4; k++) {
            out[2 + 4 * b + k] = static_cast<uint8_t>(s.done[b].point[k]);
            high |= static_cast<unsigned>(s.done[b].point[k]) >> 8 << 3 * k;
        }
        if (s.largest != 0) high |= (scale_bits(id, s.done[b].scale, 7) | s.done[b].signs[0] * 8u) << 12;
        const uint16_t word = static_cast<uint16_t>(high);
        std::memcpy(out + 34 + 2 * b, &word, 2);
    }
}

INLINE void pack_m(const Super &s, Counts &, uint8_t *out) {
    for (int b = 0; b < 16; b++) {
        const uint16_t *const point = s.done[b].point;
        out[2 * b] = static_cast<uint8_t>(point[0]);
        out[2 * b + 1] = static_cast<uint8_t>(point[1]);
        out[32 + b] = static_cast<uint8_t>(point[0] >> 8 | point[1] >> 8 << 4);
    }
    if (s.largest == 0) return;
    const Grid &g = grid(GridName::iq1);
    float d = s.largest / 15, sumqx = 0, sumq2 = 0;
    const float id = 1 / d;
    uint16_t words[4] = {};
    for (int b = 0; b < 16; b++) {
        const Done &done = s.done[b];
        const unsigned l = scale_bits(id, done.scale, 7);
        words[b / 4] = static_cast<uint16_t>(words[b / 4] | l << 3 * (b % 4));
        out[32 + b] |= static_cast<uint8_t>((is_up(done.signs[0], 0) ? 0 : 0x08) | (is_up(done.signs[0], 1) ? 0 : 0x80));
        Block again;
        weigh<Mixed>(s.x + 16 * b, s.weights ? s.weights + 16 * b : nullptr, s.sigma2, again);
        for (int i = 0; i < 16; i++) {
            const float *const grid_of_it = is_up(done.signs[0], i / 8) ? UP : DOWN;
            const float q = grid_of_it[g.words[done.point[i / 8]] >> 4 * (i % 8) & 3] * static_cast<float>(2 * l + 1);
            const float wq = again.w[i] * q;
            sumqx += wq * s.x[16 * b + i];
            sumq2 += wq * q;
        }
    }
    if (sumq2 > 0) d = sumqx / sumq2;
    const uint16_t stored = half(d * 1.1125f);
    for (int k = 0; k < 4; k++) words[k] = static_cast<uint16_t>(words[k] | (stored >> 4 * k & 15) << 12);
    std::memcpy(out + 48, words, 8);
}

}  // namespace

KERNEL(iq1_s) { superblocks<S, 50>(call, quantize_s, pack_s); }
KERNEL(iq1_m) { superblocks<Mixed, 56>(call, quantize_m, pack_m); }
