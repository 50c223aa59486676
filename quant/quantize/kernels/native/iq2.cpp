// IQ2_XXS, IQ2_XS and IQ2_S: groups of eight weights on a grid of eight dimensions with three levels each.
//
// Lanes are the scales that are tried for one block (13 or 19 of them), and in the search the neighbors of one code.
// Superblocks are done one after another. Each lane adds in ggml's order (quantize_row_iq2_*_impl in ggml-quants.c).
#include "eight.h"
#include "grid_blocks.h"

namespace {

// How the three types differ. SCALE_FIRST: the scales that are tried lie around one from a first search, and all points
// are searched again with the scale that is chosen.
struct Xxs {
    static constexpr GridName NAME = GridName::iq2_xxs;
    static constexpr int N = 32, TRIES = 13, MIDDLE = 6;
    static constexpr float EMPTY = 1e-15f, SIGMA = 1.0f;
    static constexpr bool EVEN_SIGNS = true, SCALE_FIRST = true, WEIGHTED = true, ROOTS = true;
    static F unweighted(F, F v) { return v; }
};
struct Xs {
    static constexpr GridName NAME = GridName::iq2_xs;
    static constexpr int N = 16, TRIES = 19, MIDDLE = 9;
    static constexpr float EMPTY = 1e-15f, SIGMA = 1.0f;
    static constexpr bool EVEN_SIGNS = true, SCALE_FIRST = false, WEIGHTED = true, ROOTS = true;
    static F unweighted(F, F v) { return v; }
};
struct S {
    static constexpr GridName NAME = GridName::iq2_s;
    static constexpr int N = 16, TRIES = 19, MIDDLE = 9;
    static constexpr float EMPTY = 1e-8f, SIGMA = 2.0f;
    static constexpr bool EVEN_SIGNS = false, SCALE_FIRST = false, WEIGHTED = false, ROOTS = true;
    static F unweighted(F sigma2, F v) { return vec(0.25f) * sigma2 + v * v; }
};

// ------------------------------------------------------------------------------------------------ the first scale

constexpr float FIRST_TRIES[16] = {4.0f,
                                   0.1f * -4 + 4, 0.1f * -3 + 4, 0.1f * -2 + 4, 0.1f * -1 + 4,
                                   0.1f * 1 + 4, 0.1f * 2 + 4, 0.1f * 3 + 4, 0.1f * 4 + 4,
                                   4, 4, 4, 4, 4, 4, 4};

// The scale from ggml's make_qp_quants for 32 weights and steps 0 … 4. The first of its nine tries keeps a step in an
// unsigned byte, where -1 becomes 255, and does not clamp at 4.
INLINE float first_scale(const Block &b) {
    constexpr int V = (9 + W - 1) / W;
    alignas(64) float reciprocal[V * W], error[V * W];
    alignas(64) int32_t byte[V * W], stop[V * W];
    for (int t = 0; t < V * W; t++) byte[t] = t ? -1 : 255, stop[t] = t ? 4 : INT32_MAX;
    for (int v = 0; v < V; v++) {
        const F id = loadu(FIRST_TRIES + v * W) / vec(b.largest), scale = vec(1.0f) / id;
        const I mask = load(byte + v * W), most = load(stop + v * W);
        F sum = vec(0.0f);
        for (int i = 0; i < 32; i++) {
            const F x = vec(b.x[i]);
            const F step = float_of(min_(nearest_int(id * x), most) & mask);
            const F difference = x - scale * step;
            sum = sum + vec(b.w[i]) * difference * difference;
        }
        store(reciprocal + v * W, id);
        store(error + v * W, sum);
    }
    int best = 0;
    for (int t = 1; t < 9; t++) best = error[t] < error[best] ? t : best;

    // Steps with that scale: kept in an unsigned byte each, as above, but summed as they are.
    alignas(64) float qx[32], q2[32];
    alignas(64) int32_t step[32];
    for (int i = 0; i < 32; i += W) {
        const F w = load(b.w + i), wx = load(b.wx + i);
        const I l = min_(nearest_int(vec(reciprocal[best]) * load(b.x + i)), vec(4));
        const F lf = float_of(l);
        store(step + i, l & vec(255));
        store(qx + i, wx * lf);
        store(q2 + i, w * lf * lf);
    }
    float sumqx = 0, sumq2 = 0;
    for (int i = 0; i < 32; i++) sumqx += qx[i], sumq2 += q2[i];

    // One step after the other is changed if that is better. All lanes are tried with the current sums; the first that
    // changes its step changes the sums, and those after it are tried again.
    for (int round = 0; round < 5; round++) {
        bool moved = false;
        for (int i = 0; i < 32; i += W) {
            const F x = load(b.x + i), w = load(b.w + i), wx = load(b.wx + i);
            const I l = load(step + i);   // no step of these is changed and then looked at again
            const F lf = float_of(l), wxl = wx * lf, wll = w * lf * lf;
            unsigned left = W == 32 ? ~0u : (1u << W) - 1;
            while (left) {
                const F qx_without = vec(sumqx) - wxl, q2_without = vec(sumq2) - wll;
                const I to = min_(nearest_int(x * q2_without / qx_without), vec(4));
                const F tf = float_of(to);
                const F qx_with = qx_without + wx * tf, q2_with = q2_without + w * tf * tf;
                const M better = (qx_without > vec(0.0f)) & (q2_without > vec(0.0f)) & ~(to == l) &
                                 (qx_with * qx_with * vec(sumq2) > vec(sumqx) * vec(sumqx) * q2_with);
                const unsigned moving = bits(better) & left;
                if (!moving) break;
                const int lane = __builtin_ctz(moving);
                alignas(64) float new_qx[W], new_q2[W];
                alignas(64) int32_t new_step[W];
                store(new_qx, qx_with);
                store(new_q2, q2_with);
                store(new_step, to & vec(255));
                sumqx = new_qx[lane];
                sumq2 = new_q2[lane];
                step[i + lane] = new_step[lane];
                moved = true;
                left &= ~((2u << lane) - 1);
            }
        }
        if (!moved) break;
    }
    return sumq2 > 0.0f ? sumqx / sumq2 : 0.0f;
}

// ------------------------------------------------------------------------------------------------ one block

// Rounds y = 0.5 * (id * x - 1) to the nearest of 0, 1, 2, ties to even: 1 for id * x > 2, and 2 from 4 on. The
// subtraction is exact near there. Where y is out of ggml's rounding range (not PLAIN), the bits of the sum are
// interpreted as ggml does.
template <bool PLAIN>
INLINE void levels_of(F x, F id, uint32_t &one, uint32_t &two) {
    const F p = id * x;
    if (PLAIN) {
        one = bits(p > vec(2.0f));
        two = bits(p >= vec(4.0f));
    } else {
        const I level = bits_of(vec(0.5f) * (p - vec(1.0f)) + vec(MAGIC)) & vec(0x007fffff);
        one = bits(level > vec(0x00400000));
        two = bits(level > vec(0x00400001));
    }
}

// Which weights of a block have a level of at least 1, and of 2, with each scale: a bit for each weight.
template <class T, bool PLAIN>
INLINE void levels_by(const Block &b, const float *ids, int n, uint32_t *ones, uint32_t *twos) {
    for (int t = 0; t < n; t++) {
        const F id = vec(ids[t]);
        ones[t] = twos[t] = 0;
        for (int i = 0; i < T::N; i += W) {
            uint32_t one, two;
            levels_of<PLAIN>(load(b.x + i), id, one, two);
            ones[t] |= one << i;
            twos[t] |= two << i;
        }
    }
}

// The two sums over a block for points in words, one try per lane: of w * x * q and of w * q * q.
struct Sums {
    F qx, q2;
};

struct Products {
    F qx[4][PARTS], q2[4][PARTS];   // by group: of every weight with the value of each level
};

template <class T>
INLINE Products products(const Block &b, F levels) {
    Products p;
    for (int k = 0; k < T::N / 8; k++) {
        for (int r = 0; r < PARTS; r++) {
            p.qx[k][r] = spread4(b.wx + 8 * k + r * DIMENSIONS) * levels;
            p.q2[k][r] = spread4(b.w + 8 * k + r * DIMENSIONS) * levels * levels;
        }
    }
    return p;
}

template <class T>
INLINE Sums sum_up(const Products &p, const int32_t (*words)[48], int first) {
    Sums s = {vec(0.0f), vec(0.0f)};
    for (int k = 0; k < T::N / 8; k++) {
        each_dimension(load(words[k] + first), [&](int i, I level) {
            s.qx = s.qx + pick(p.qx[k][i / DIMENSIONS], level);
            s.q2 = s.q2 + pick(p.q2[k][i / DIMENSIONS], level);
        });
    }
    return s;
}

// The points of a group for every try; `on_grid` gets a bit for each try whose code is a point itself.
template <class T>
INLINE bool try_points(const Grid &g, const Block &b, int k, F levels, const uint32_t *ones, const uint32_t *twos,
                       const float *scale, int32_t *words, uint32_t &on_grid) {
    const Eight e = eight(b.x + 8 * k, b.root + 8 * k);
    uint32_t *const to = reinterpret_cast<uint32_t *>(words);
    uint32_t last = 1u << (T::TRIES - 1);   // a bit for each try that is the last one of a run with the same code
    for (int t = 1; t < T::TRIES; t++) {
        const uint32_t changed = (ones[t] ^ ones[t - 1]) | (twos[t] ^ twos[t - 1]);
        last |= static_cast<uint32_t>((changed >> 8 * k & 255) != 0) << (t - 1);
    }
    bool found = true;
    on_grid = 0;
    for (int t = 0; t < T::TRIES; last &= last - 1) {
        const int end = __builtin_ctz(last) + 1;
        const Cell cell = g.cells[POWERS.of[ones[t] >> 8 * k & 255] + POWERS.of[twos[t] >> 8 * k & 255]];
        const uint32_t *const near = g.words + cell.first;
        if (!cell.count) {
            on_grid |= (2u << (end - 1)) - (1u << t);
            for (; t < end; t++) to[t] = *near;
            continue;
        }
        // Results for scales beyond the run are overwritten by the next run.
        for (; end - t > SCALES; t += 2 * SCALES) {
            found &= nearest_points<2>(near, cell.count, e, levels, scale + t, end - t, to + t);
        }
        if (t < end) found &= nearest_points<1>(near, cell.count, e, levels, scale + t, end - t, to + t);
        t = end;
    }
    return found;
}

// The point of one group with one scale.
INLINE bool point_of(const Grid &g, const Block &b, int k, F levels, uint32_t ones, uint32_t twos, float scale,
                     int32_t *word) {
    const Cell cell = g.cells[POWERS.of[ones >> 8 * k & 255] + POWERS.of[twos >> 8 * k & 255]];
    uint32_t found = g.words[cell.first];
    const bool well = !cell.count || nearest_point(g.words + cell.first, cell.count,
                                                   eight(b.x + 8 * k, b.root + 8 * k), levels, scale, &found);
    *word = static_cast<int32_t>(found);
    return well;
}

// Quantizes a block. Returns false where ggml would abort.
template <class T>
INLINE bool quantize(const Grid &g, const float *x, const float *weights, float sigma2, Done &done) {
    constexpr int V = (T::TRIES + W - 1) / W, GROUPS = T::N / 8;
    Block b;
    if (!weigh<T>(x, weights, sigma2, b)) return false;
    take_signs<T>(x, b);
    for (int k = 0; k < GROUPS; k++) done.point[k] = 0, done.signs[k] = b.signs[k];
    done.scale = 0;
    if (b.largest < T::EMPTY) {
        for (int k = 0; k < GROUPS; k++) done.signs[k] = 0;
        return true;
    }
    for (int i = 0; i < T::N; i += W) store(b.wx + i, load(b.w + i) * load(b.x + i));
    for (int i = T::N; i < 48; i++) b.x[i] = b.root[i] = b.w[i] = b.wx[i] = 0;

    float scale, divisor;
    if (T::SCALE_FIRST) {
        scale = first_scale(b);
        divisor = scale * 3;
        if (divisor <= 0) {
            for (int k = 0; k < GROUPS; k++) done.signs[k] = 0;
            return true;
        }
    } else {
        scale = b.largest / 5;
        divisor = b.largest;
    }
    const F levels = level_table(1, 3, 5);
    alignas(64) float steps[V * W], ids[V * W], scales[V * W + 4];
    alignas(64) int32_t words[4][48];
    for (int t = 0; t < V * W; t++) steps[t] = 5 + static_cast<float>(t - T::MIDDLE) * 0.1f;
    for (int v = 0; v < V; v++) {
        const F id = load(steps + v * W) / vec(divisor);
        store(scales + v * W, vec(1.0f) / id);
        store(ids + v * W, id);
        for (int k = 0; k < GROUPS; k++) store(words[k] + v * W, vec(0));
    }
    uint32_t ones[T::TRIES], twos[T::TRIES];
    const bool plain = b.smallest >= -1e6f * divisor && b.largest <= 1e6f * divisor;
    if (plain) levels_by<T, true>(b, ids, T::TRIES, ones, twos);
    else levels_by<T, false>(b, ids, T::TRIES, ones, twos);
    uint32_t on_grid[4];
    bool well = true;
    for (int k = 0; k < GROUPS; k++) well &= try_points<T>(g, b, k, levels, ones, twos, scales, words[k], on_grid[k]);
    if (!well) return false;

    const Products p = products<T>(b, levels);
    alignas(64) float qx2[V * W], q2[V * W], by[V * W], gain[V * W];
    for (int v = 0; v < V; v++) {
        const Sums s = sum_up<T>(p, words, v * W);
        store(qx2 + v * W, s.qx * s.qx);
        store(q2 + v * W, s.q2);
        store(by + v * W, s.qx / s.q2);
        store(gain + v * W, s.qx / s.q2 * s.qx);
    }
    float best = 0;
    int chosen = -1;
    for (int t = 0; t < T::TRIES; t++) {
        if (q2[t] > 0 && qx2[t] > best * q2[t]) scale = by[t], best = gain[t], chosen = t;
    }
    int32_t word[4];
    bool again = false;
    for (int k = 0; k < GROUPS; k++) {
        word[k] = static_cast<int32_t>(chosen < 0 ? g.words[0] : static_cast<uint32_t>(words[k][chosen]));
        again |= T::SCALE_FIRST || (chosen >= 0 && !(on_grid[k] >> chosen & 1));
    }
    if (again && scale > 0) {
        const float id = 1 / scale;
        uint32_t one, two;
        levels_by<T, false>(b, &id, 1, &one, &two);
        for (int k = 0; k < GROUPS; k++) {
            if (!T::SCALE_FIRST && (on_grid[k] >> chosen & 1)) continue;
            well &= point_of(g, b, k, levels, one, two, scale, word + k);
        }
        float sumqx = 0, sumq2 = 0;
        for (int i = 0; i < T::N; i++) {
            const float q = static_cast<float>(2 * (word[i / 8] >> 4 * (i % 8) & 3) + 1);
            sumqx += b.wx[i] * q;
            sumq2 += b.w[i] * q * q;
        }
        if (sumq2 > 0) scale = sumqx / sumq2;
    }
    if (scale < 0) {
        scale = -scale;
        for (int k = 0; k < GROUPS; k++) done.signs[k] = static_cast<uint8_t>(~done.signs[k] & (T::EVEN_SIGNS ? 127 : 255));
    }
    done.scale = scale;
    for (int k = 0; k < GROUPS; k++) {
        const Cell cell = g.cells[code_of_word(static_cast<uint32_t>(word[k]))];
        done.point[k] = static_cast<uint16_t>(cell.first);
    }
    return well && scale >= 0;
}

INLINE void pack_xxs(const Super &s, Counts &, uint8_t *out) {
    if (s.largest == 0) return;
    const float d = s.largest / 31, id = 1 / d;
    const uint16_t stored = half(d);
    std::memcpy(out, &stored, 2);
    for (int b = 0; b < 8; b++) {
        uint32_t q[2] = {0, scale_bits(id, s.done[b].scale) << 28};
        for (int k = 0; k < 4; k++) {
            q[0] |= static_cast<uint32_t>(s.done[b].point[k]) << 8 * k;
            q[1] |= static_cast<uint32_t>(s.done[b].signs[k]) << 7 * k;
        }
        std::memcpy(out + 2 + 8 * b, q, 8);
    }
}

INLINE void pack_xs(const Super &s, Counts &, uint8_t *out) {
    if (s.largest == 0) return;
    const float d = s.largest / 31, id = 1 / d;
    const uint16_t stored = half(d);
    std::memcpy(out, &stored, 2);
    for (int b = 0; b < 16; b++) {
        for (int k = 0; k < 2; k++) {
            const uint16_t q = static_cast<uint16_t>(s.done[b].point[k] | s.done[b].signs[k] << 9);
            std::memcpy(out + 2 + 4 * b + 2 * k, &q, 2);
        }
        out[66 + b / 2] |= static_cast<uint8_t>(scale_bits(id, s.done[b].scale) << 4 * (b % 2));
    }
}

INLINE void pack_s(const Super &s, Counts &, uint8_t *out) {
    const float d = s.largest / 31, id = 1 / d;
    const uint16_t stored = s.largest == 0 ? 0 : half(d * 0.9875f);
    std::memcpy(out, &stored, 2);
    for (int b = 0; b < 16; b++) {
        for (int k = 0; k < 2; k++) {
            const int i = 2 * b + k;
            out[2 + i] = static_cast<uint8_t>(s.done[b].point[k]);
            out[34 + i] = s.done[b].signs[k];
            out[66 + i / 4] |= static_cast<uint8_t>(s.done[b].point[k] >> 8 << 2 * (i % 4));
        }
        if (s.largest != 0) out[74 + b / 2] |= static_cast<uint8_t>(scale_bits(id, s.done[b].scale) << 4 * (b % 2));
    }
}

}  // namespace

KERNEL(iq2_xxs) { superblocks<Xxs, 66>(call, quantize<Xxs>, pack_xxs); }
KERNEL(iq2_xs) { superblocks<Xs, 74>(call, quantize<Xs>, pack_xs); }
KERNEL(iq2_s) { superblocks<S, 82>(call, quantize<S>, pack_s); }
