// IQ4_NL: blocks of 32 weights with a scale, each weight one of 16 uneven steps. IQ4_XS: superblocks of eight such
// blocks, whose scales are stored as levels of one fp16 number (quantize_row_iq4_nl_impl in ggml-quants.c).
//
// ggml tries 16 scales for a block, and for each of them finds the nearest step of every weight. The tries differ by
// little: 15 of them multiply the weights by (-134 … -120) / max. Two neighboring thresholds between steps differ by
// a factor of 1.2 at least, and 134 / 120 is less: over all 15 tries a weight crosses one threshold at most. So for
// each weight two candidate steps and the threshold between them are found once, and a try needs one comparison. The
// sums run through the weights in order, several tries at a time.
#include "kernel.h"
#include "search.h"

namespace {

constexpr int TRIES = 15;        // 2 * 7 + 1

alignas(64) constexpr float STEPS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
alignas(64) constexpr float NEXT[16] = {-104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113, 113};
// From here on the next step is nearest: exactly the middle. Near it both distances are exact in floats (they are not
// larger than the number itself, or small multiples of its last place), and at equal distances ggml takes the upper.
alignas(64) constexpr float UP[16] = {-115.5f, -93.5f, -74, -57, -42, -28.5f, -16, -4.5f,
                                      7, 19, 31.5f, 45.5f, 61, 79, 101, INFINITY};

// best_index_int8: the step nearest to `a`, which is not NaN.
INLINE I nearest_step(F a) {
    I i = select(a >= vec(UP[7]), vec(8), vec(0));
    i = i + select(a >= lookup16(UP, i + vec(3)), vec(4), vec(0));
    i = i + select(a >= lookup16(UP, i + vec(1)), vec(2), vec(0));
    return i + select(a >= lookup16(UP, i), vec(1), vec(0));
}

struct Scaled {
    F scale;
    M odd;
};

// The scale of 32 weights `x` with error weights `w`, before it is rounded.
INLINE Scaled scale_of(const F *x, const F *w) {
    F max;
    const M empty = largest_first(x, 32, max) < vec(TINY);

    const F first = vec(1.0f) / (-max / vec(STEPS[0]));
    F id[TRIES], sumqx[TRIES], sumq2[TRIES];
    for (int t = 0; t < TRIES; t++) {
        id[t] = vec(static_cast<float>(t - 7) + STEPS[0]) / max;
        sumqx[t] = sumq2[t] = vec(0.0f);
    }
    F qx = vec(0.0f), q2 = vec(0.0f);

    // What a weight adds to the sums with the lower of its two steps, and with the upper.
    F up[32], lower_qx[32], lower_q2[32], upper_qx[32], upper_q2[32];
    for (int j = 0; j < 32; j++) {
        const F q = lookup16(STEPS, nearest_step(first * x[j])), wq = w[j] * q;
        qx = qx + wq * x[j];
        q2 = q2 + wq * q;

        const I step = nearest_step(min_(id[0] * x[j], id[TRIES - 1] * x[j]));
        const F lower = lookup16(STEPS, step), upper = lookup16(NEXT, step);
        const F wl = w[j] * lower, wu = w[j] * upper;
        up[j] = lookup16(UP, step);
        lower_qx[j] = wl * x[j];
        lower_q2[j] = wl * lower;
        upper_qx[j] = wu * x[j];
        upper_q2[j] = wu * upper;
    }
    constexpr int AT_ONCE = W == 16 ? 8 : 5;
    for (int t0 = 0; t0 < TRIES; t0 += AT_ONCE) {
        for (int j = 0; j < 32; j++) {
            for (int t = t0; t < t0 + AT_ONCE && t < TRIES; t++) {
                const M above = id[t] * x[j] >= up[j];
                sumqx[t] = sumqx[t] + select(above, upper_qx[j], lower_qx[j]);
                sumq2[t] = sumq2[t] + select(above, upper_q2[j], lower_q2[j]);
            }
        }
    }

    F d = select(q2 > vec(0.0f), qx / q2, vec(0.0f)), best = d * qx;
    for (int t = 0; t < TRIES; t++) {
        const M better = (sumq2[t] > vec(0.0f)) & (sumqx[t] * sumqx[t] > best * sumq2[t]);
        d = select(better, sumqx[t] / sumq2[t], d);
        best = select(better, d * sumqx[t], best);
    }
    // All weights are within ±largest, so no product above leaves -134.1 … 134.1, as long as 127 / max is finite.
    return {select(empty, vec(0.0f), d), ~empty & ~(abs(first) < vec(INFINITY))};
}

// The weights of the squared errors: from the column weight and the weight itself.
INLINE void weigh(const Group &g, int64_t offset, F sigma2, const F *x, F *w) {
    if (g.weighted) load_lanes(g.w, offset, 32, w);
    for (int j = 0; j < 32; j++) w[j] = g.weighted ? w[j] * sqrt(sigma2 + x[j] * x[j]) : x[j] * x[j];
}

// The steps of 32 weights as 16 bytes: the first half in the low bits, the second in the high ones.
INLINE void store_steps(const F *x, F id, uint8_t *const *to, int offset) {
    I step[32], words[4];
    for (int j = 0; j < 32; j++) step[j] = nearest_step(id * x[j]);
    for (int j = 0; j < 16; j++) step[j] = step[j] | shl<4>(step[j + 16]);
    for (int k = 0; k < 4; k++) words[k] = word(step[4 * k], step[4 * k + 1], step[4 * k + 2], step[4 * k + 3]);
    store_words(words, 4, to, offset);
}

INLINE M iq4_nl(const Group &g) {
    F x[32], w[32];
    const F sum = load_squares(g.x, 0, 32, x);
    weigh(g, 0, sum * vec(2.0f / 32), x, w);
    const auto [d, odd] = scale_of(x, w);
    const F id = select(d == vec(0.0f), vec(0.0f), vec(1.0f) / d);
    store_half(to_half(d), g.out, 0);
    store_steps(x, id, g.out, 2);
    return odd | ~finite(sum) | ~finite(id);
}

INLINE M iq4_xs(const Group &g) {
    F x[256], w[32], scale[8];
    const F sum = load_squares(g.x, 0, 256, x), sigma2 = sum * vec(2.0f / 256);
    M odd = ~finite(sum);
    for (int b = 0; b < 8; b++) {
        weigh(g, 32 * b, sigma2, x + 32 * b, w);
        const Scaled found = scale_of(x + 32 * b, w);
        scale[b] = found.scale;
        odd = odd | found.odd | ~finite(found.scale);
    }
    F max;
    largest_first(scale, 8, max);
    const F d = -max / vec(32.0f), id = select(d == vec(0.0f), vec(0.0f), vec(1.0f) / d);
    odd = odd | ~finite(id) | ~roundable(id * max);
    I low = vec(0), high = vec(0);
    for (int b = 0; b < 8; b++) {
        const F l = rounded(id * scale[b], vec(MAGIC - 32), vec(MAGIC + 31)), dl = d * l;
        const F idl = select(dl == vec(0.0f), vec(0.0f), vec(1.0f) / dl);
        odd = odd | ~finite(idl);
        store_steps(x + 32 * b, idl, g.out, 8 + 16 * b);
        const I level = trunc(l) + vec(32);
        low = shr<4>(low) | shl<28>(level);   // the first block ends up in the lowest bits
        high = shr<2>(high) | shl<14>(shr<4>(level));
    }
    store_half(to_half(d), g.out, 0);
    store_half(high, g.out, 2);
    store_words(&low, 1, g.out, 4);
    return odd;
}

}  // namespace

KERNEL(iq4_xs) { run<23, 256, 136>(call, iq4_xs); }
KERNEL(iq4_nl) { run<20, 32, 18>(call, iq4_nl); }
