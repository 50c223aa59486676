// The searches for the scale of a block that the K types and the older types share, each in ggml's order.
//
// P blocks of n weights are searched side by side. They are independent; but each is one long chain of dependent sums,
// and interleaving several chains hides their latency.
#pragma once

#include "lanes.h"

namespace {

constexpr float TINY = 1e-15f;   // ggml's GROUP_MAX_EPS: smaller weights count as zero

#define UNROLL _Pragma("GCC unroll 4")

INLINE F largest_first(const F *x, int n, F &max) {   // the largest magnitude, and the first weight that has it
    F largest = vec(0.0f);
    max = vec(0.0f);
    for (int i = 0; i < n; i++) {
        const F size = abs(x[i]);
        const M more = size > largest;
        largest = select(more, size, largest);
        max = select(more, x[i], max);
    }
    return largest;
}

// ---- A scale and a minimum: x is about scale * l - shift, with l in 0 … nmax (make_qkx2_quants, make_qkx3_quants)

struct Affine {
    F scale, shift;
    F iscale, base;   // its levels are nearest_int(iscale * (x - base)), clamped
    F low, high;      // the least and largest weight
};

template <int nmax> INLINE F affine_level(const Affine &a, F x) {
    return rounded(a.iscale * (x - a.base), vec(MAGIC), vec(MAGIC + nmax));
}

// One pass over the weights: their levels for a scale, and the sums that give the best scale and minimum for them.
// Levels are clamped only with `clamp_low` and `clamp_high`: mostly no level can leave the range.
template <int n, int nmax, int P, bool clamp_low, bool clamp_high>
INLINE void affine_sums(const F *x, const F *w, const F *min, const F *iscale, F (*level)[n], F *l1, F *l2, F *lx) {
    const F top = vec(static_cast<float>(nmax));
    for (int p = 0; p < P; p++) l1[p] = l2[p] = lx[p] = vec(0.0f);
    UNROLL for (int i = 0; i < n; i++) {
        for (int p = 0; p < P; p++) {
            const F xi = x[p * n + i];
            F l = nearest(iscale[p] * (xi - min[p]));
            if (clamp_low) l = max_(l, vec(0.0f));
            if (clamp_high) l = min_(l, top);
            const F wl = w[p * n + i] * l;
            level[p][i] = l;
            l1[p] = l1[p] + wl;
            l2[p] = l2[p] + wl * l;
            lx[p] = lx[p] + wl * xi;
        }
    }
}

template <int n, int P, bool absolute>
INLINE void affine_error(const F *x, const F *w, const F *min, const F *scale, const F (*level)[n], F *error) {
    for (int p = 0; p < P; p++) error[p] = vec(0.0f);
    UNROLL for (int i = 0; i < n; i++) {
        for (int p = 0; p < P; p++) {
            const F diff = scale[p] * level[p][i] + min[p] - x[p * n + i];
            error[p] = error[p] + w[p * n + i] * (absolute ? abs(diff) : diff * diff);
        }
    }
}

// Candidate number `is` tries (rmin + rdelta * is + nmax) levels between minimum and maximum. When a candidate is taken,
// the minimum changes, and all later candidates start from the new one.
template <int n, int nmax, int P, bool absolute>
INLINE M affine_search(const F *x, const F *w, float rmin, float rdelta, int steps, Affine *found) {
    F level[P][n], min[P], sum_w[P], sum_x[P], best[P], iscale[P], scale[P];
    M flat[P], odd = no_lane();
    for (int p = 0; p < P; p++) {
        const F *xp = x + p * n, *wp = w + p * n;
        F low = xp[0], high = xp[0];
        sum_w[p] = wp[0];
        sum_x[p] = wp[0] * xp[0];
        for (int i = 1; i < n; i++) {
            low = min_(xp[i], low);
            high = max_(xp[i], high);
            sum_w[p] = sum_w[p] + wp[i];
            sum_x[p] = sum_x[p] + wp[i] * xp[i];
        }
        min[p] = select(low > vec(0.0f), vec(0.0f), low);
        flat[p] = high <= min[p];
        const F range = high - min[p];
        iscale[p] = vec(static_cast<float>(nmax)) / range;
        scale[p] = vec(1.0f) / iscale[p];
        odd = odd | (~flat[p] & ~roundable(iscale[p] * range));
        found[p].low = low;
        found[p].high = high;
        found[p].scale = select(flat[p], vec(0.0f), scale[p]);
        found[p].iscale = select(flat[p], vec(0.0f), iscale[p]);
        found[p].base = min[p];
    }
    F l1[P], l2[P], lx[P], error[P], this_scale[P], this_min[P];
    affine_sums<n, nmax, P, true, true>(x, w, min, iscale, level, l1, l2, lx);
    affine_error<n, P, absolute>(x, w, min, scale, level, best);

    for (int is = 0; is <= steps; is++) {
        const float more = rmin + rdelta * is;
        const F levels = vec(more + nmax);
        M below = no_lane(), solvable[P];
        for (int p = 0; p < P; p++) {
            const F range = found[p].high - min[p];
            iscale[p] = levels / range;
            const F lowest = iscale[p] * (found[p].low - min[p]);
            odd = odd | ~(flat[p] | (roundable(lowest) & roundable(iscale[p] * range)));
            // A minimum above all weights reverses their order: the least weight has the highest level.
            below = below | ~(flat[p] | ((lowest >= vec(-0.5f)) & (range > vec(0.0f))));
        }
        // Below nmax + 0.5 nothing rounds to more than nmax.
        if (any(below)) affine_sums<n, nmax, P, true, true>(x, w, min, iscale, level, l1, l2, lx);
        else if (more < 0.45f) affine_sums<n, nmax, P, false, false>(x, w, min, iscale, level, l1, l2, lx);
        else affine_sums<n, nmax, P, false, true>(x, w, min, iscale, level, l1, l2, lx);
        for (int p = 0; p < P; p++) {
            const F det = sum_w[p] * l2[p] - l1[p] * l1[p];
            solvable[p] = det > vec(0.0f);
            this_scale[p] = (sum_w[p] * lx[p] - sum_x[p] * l1[p]) / det;
            this_min[p] = (l2[p] * sum_x[p] - l1[p] * lx[p]) / det;
            const M positive = this_min[p] > vec(0.0f);
            if (any(positive)) {
                this_min[p] = select(positive, vec(0.0f), this_min[p]);
                this_scale[p] = select(positive, lx[p] / l2[p], this_scale[p]);
            }
        }
        affine_error<n, P, absolute>(x, w, this_min, this_scale, level, error);
        for (int p = 0; p < P; p++) {
            const M better = solvable[p] & (error[p] < best[p]) & ~flat[p];
            best[p] = select(better, error[p], best[p]);
            found[p].scale = select(better, this_scale[p], found[p].scale);
            found[p].iscale = select(better, iscale[p], found[p].iscale);
            found[p].base = select(better, min[p], found[p].base);
            min[p] = select(better, this_min[p], min[p]);
        }
    }
    for (int p = 0; p < P; p++) {
        found[p].shift = -min[p];
        odd = odd | ~(found[p].scale >= vec(0.0f)) | ~finite(found[p].scale) | ~finite(min[p]);
    }
    return odd;
}

// ---- A scale: x is about scale * (l - nmax), with l in 0 … 2 * nmax - 1 (make_qx_quants with rmse_type 1)

struct Symmetric {
    F scale;
    F iscale;   // its levels are nearest_int(iscale * x), clamped, plus nmax
    M empty;    // all weights are zero, and so are the levels
    F largest;  // the largest magnitude
};

template <int nmax> INLINE F symmetric_level(const Symmetric &s, F x) {
    const F l = rounded(s.iscale * x, vec(MAGIC - nmax), vec(MAGIC + nmax - 1));
    return select(s.empty, vec(0.0f), l + vec(static_cast<float>(nmax)));
}

// The sums of K candidates. The loop over weights is outside, so each candidate adds in their order. Levels are clamped
// only where candidates can leave 0 … 2 * nmax - 1.
template <int n, int nmax, int K, bool clamp_low, bool clamp_high>
INLINE void symmetric_sums(const F *x, const F *w, const F *iscale, F *sumlx, F *suml2) {
    const F low = vec(static_cast<float>(-nmax)), high = vec(static_cast<float>(nmax - 1));
    F lx[K], l2[K], scale[K];
    for (int k = 0; k < K; k++) {
        lx[k] = l2[k] = vec(0.0f);
        scale[k] = iscale[k];
    }
    for (int i = 0; i < n; i++) {
        const F xi = x[i], wi = w[i], wx = wi * xi;
        for (int k = 0; k < K; k++) {
            F l = nearest(scale[k] * xi);
            if (clamp_low) l = max_(l, low);
            if (clamp_high) l = min_(l, high);
            lx[k] = lx[k] + wx * l;
            l2[k] = l2[k] + wi * l * l;
        }
    }
    for (int k = 0; k < K; k++) {
        sumlx[k] = lx[k];
        suml2[k] = l2[k];
    }
}

// For finite x. Candidates -9 … 9 try nmax + 0.1 * candidate levels on either side; the start is number 0. No product
// iscale * x is larger than nmax + 1, so that all of them are roundable.
template <int n, int nmax> INLINE Symmetric symmetric_search(const F *x, const F *w) {
    constexpr int FIRST = 9;   // where candidate 0 stands
    F max;
    const F largest = largest_first(x, n, max);
    const M empty = largest < vec(TINY);
    F iscale[19], sumlx[19], suml2[19];
    for (int is = -9; is <= 9; is++) {
        iscale[FIRST + is] = vec(is ? -(nmax + 0.1f * is) : static_cast<float>(-nmax)) / max;
    }
    symmetric_sums<n, nmax, 4, false, false>(x, w, iscale, sumlx, suml2);   // up to nmax - 0.6: nothing to clamp
    symmetric_sums<n, nmax, 5, false, true>(x, w, iscale + 4, sumlx + 4, suml2 + 4);
    symmetric_sums<n, nmax, 5, false, true>(x, w, iscale + 9, sumlx + 9, suml2 + 9);   // up to nmax + 0.4
    symmetric_sums<n, nmax, 5, true, true>(x, w, iscale + 14, sumlx + 14, suml2 + 14);
    const M none = suml2[FIRST] == vec(0.0f);
    Symmetric found = {select(none, vec(0.0f), sumlx[FIRST] / suml2[FIRST]), iscale[FIRST], empty, largest};
    F best = found.scale * sumlx[FIRST];
    for (int k = 0; k < 19; k++) {
        if (k == FIRST) continue;
        const F scale = sumlx[k] / suml2[k];
        const M better = (suml2[k] > vec(0.0f)) & (sumlx[k] * sumlx[k] > best * suml2[k]);
        found.scale = select(better, scale, found.scale);
        found.iscale = select(better, iscale[k], found.iscale);
        best = select(better, scale * sumlx[k], best);
    }
    found.scale = select(empty, vec(0.0f), found.scale);
    return found;
}

// ---- A scale for numbers that are not negative: x is about scale * l, with l in 0 … nmax (make_qp_quants)

template <int n, int P>
INLINE M positive_search(const F (*x)[n], const F *w, int nmax, F (*level)[n], F *found) {
    const F top = vec(MAGIC + nmax), magic = vec(MAGIC);
    F max[P], iscale[P], best[P], lx[P], l2[P];
    M empty[P], odd = no_lane();
    for (int p = 0; p < P; p++) {
        max[p] = vec(0.0f);
        for (int i = 0; i < n; i++) max[p] = max_(max[p], x[p][i]);
        empty[p] = max[p] < vec(TINY);
        iscale[p] = vec(static_cast<float>(nmax)) / max[p];
        best[p] = vec(0.0f);
        odd = odd | ~(empty[p] | finite(max[p]));
        const F scale = vec(1.0f) / iscale[p];
        for (int i = 0; i < n; i++) {
            const F diff = x[p][i] - scale * (min_(iscale[p] * x[p][i] + magic, top) - magic);
            best[p] = best[p] + w[i] * diff * diff;
        }
    }
    for (int is = -4; is <= 4; is++) {
        if (is == 0) continue;
        for (int p = 0; p < P; p++) {
            const F this_iscale = vec(0.1f * is + nmax) / max[p], scale = vec(1.0f) / this_iscale;
            F error = vec(0.0f);
            for (int i = 0; i < n; i++) {
                const F diff = x[p][i] - scale * (min_(this_iscale * x[p][i] + magic, top) - magic);
                error = error + w[i] * diff * diff;
            }
            const M better = error < best[p];
            best[p] = select(better, error, best[p]);
            iscale[p] = select(better, this_iscale, iscale[p]);
        }
    }
    for (int p = 0; p < P; p++) {
        lx[p] = l2[p] = vec(0.0f);
        for (int i = 0; i < n; i++) {
            const F l = min_(iscale[p] * x[p][i] + magic, top) - magic;
            level[p][i] = select(empty[p], vec(0.0f), l);
            lx[p] = lx[p] + w[i] * x[p][i] * l;
            l2[p] = l2[p] + w[i] * l * l;
        }
    }
    // Each number in turn takes its best level given the others, in at most five rounds. A lane without a change would
    // not change in another round either.
    for (int round = 0; round < 5; round++) {
        M changed = no_lane();
        for (int i = 0; i < n; i++) {
            for (int p = 0; p < P; p++) {
                const F xi = x[p][i], l = level[p][i], wx = w[i] * xi;
                const F slx = lx[p] - wx * l, sl2 = l2[p] - w[i] * l * l;
                const M able = (slx > vec(0.0f)) & (sl2 > vec(0.0f)) & ~empty[p];
                const F wanted = xi * sl2 / slx;
                odd = odd | (able & ~roundable(wanted));
                const F other = min_(wanted + magic, top) - magic;
                const F olx = slx + wx * other, ol2 = sl2 + w[i] * other * other;
                const M better = able & ~(other == l) & (olx * olx * l2[p] > lx[p] * lx[p] * ol2);
                level[p][i] = select(better, other, l);
                lx[p] = select(better, olx, lx[p]);
                l2[p] = select(better, ol2, l2[p]);
                changed = changed | better;
            }
        }
        if (!any(changed)) break;
    }
    for (int p = 0; p < P; p++) {
        found[p] = select(empty[p] | ~(l2[p] > vec(0.0f)), vec(0.0f), lx[p] / l2[p]);
    }
    return odd;
}

}  // namespace
