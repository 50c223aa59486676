// The search of IQ1 for the best partition of a block's sorted weights into three levels.
//
// A cut is a pair of places in the sorted order. ggml tries every pair, the first place in the outer loop, and takes a
// cut that is better than the best so far. Here lanes are second places.
#pragma once

#include <cfloat>

#include "across.h"

namespace {

// Counts for each weight of a block how many are less; with `ties` also the equal ones before it.
template <int N, bool ties>
INLINE void count_less(const float *x, int32_t *rank) {
    for (int i = 0; i < N; i += W) {
        const F mine = load(x + i);
        I before = vec(0);
        for (int j = 0; j < N; j++) {
            const F other = vec(x[j]);
            M less = other < mine;
            if (ties) less = less | ((other == mine) & mask_of(j < i ? ~0u : j < i + W ? ~((2u << (j - i)) - 1) : 0));
            before = before + select(less, vec(1), vec(0));
        }
        store(rank + i, before);
    }
}

// The ranks of a block's weights in sorted order. Equal weights keep their order, as in glibc's qsort (a merge sort).
template <int N>
INLINE void ranks(const float *x, int32_t *rank) {
    count_less<N, false>(x, rank);
    uint64_t taken = 0;
    for (int i = 0; i < N; i++) taken |= uint64_t{1} << rank[i];
    if (taken != (uint64_t{1} << N) - 1) count_less<N, true>(x, rank);
}

// The best cut so far.
struct Cut {
    float score = -FLT_MAX, scale = 0;
    int first = -1, second = -1;
    int way = -1;   // in which way the levels are shifted
};

// The sums of W cuts with the same first place, or of one cut, for every way to shift the levels.
template <class V, int WAYS>
struct Sums {
    V qx[WAYS], q2[WAYS];
};

// What ggml does for one cut.
template <int WAYS>
INLINE void take(Cut &best, const Sums<float, WAYS> &s, int first, int second) {
    for (int way = 0; way < WAYS; way++) {
        if (s.q2[way] > 0 && s.qx[way] * s.qx[way] > best.score * s.q2[way]) {
            best = {0, s.qx[way] / s.q2[way], first, second, way};
            best.score = best.scale * s.qx[way];
        }
    }
}

template <int WAYS>
INLINE unsigned better(const Sums<F, WAYS> &s, F score) {
    M good = no_lane();
    for (int way = 0; way < WAYS; way++) {
        good = good | ((s.qx[way] * s.qx[way] > score * s.q2[way]) & (s.q2[way] > vec(0.0f)));
    }
    return bits(good);
}

// The lanes of the second places from v + 1 on that are not before i1.
INLINE unsigned lanes_from(int i1, int v) {
    const unsigned every = (1u << W) - 1;
    return i1 - 1 > v ? every & ~((1u << (i1 - 1 - v)) - 1) : every;
}

// The cut that ggml takes last, found in ggml's order. `one(i1, i2)` returns the sums of a cut, `some(i1, v)` those of
// W second places from v + 1 on.
template <int N, class One, class Some>
INLINE Cut cut_in_order(One one, Some some) {
    Cut best;
    take(best, one(0, 0), 0, 0);
    for (int i1 = 0; i1 <= N; i1++) {
        for (int v = i1 > 0 ? (i1 - 1) / W * W : 0; v < N; v += W) {
            unsigned left = lanes_from(i1, v);
            const auto sums = some(i1, v);
            while (const unsigned good = better(sums, vec(best.score)) & left) {
                const int second = v + __builtin_ctz(good) + 1;
                take(best, one(i1, second), i1, second);
                left &= ~((2u << __builtin_ctz(good)) - 1);
            }
        }
    }
    return best;
}

template <int N>
INLINE int less_than(const float *x, float bound) {
    int n = 0;
    for (int i = 0; i < N; i += W) n += __builtin_popcount(bits(load(x + i) < vec(bound)));
    return n;
}

constexpr float CLOSE = 1.0f - 0x1p-17f, APART = 1.0f - 0x1p-18f;   // see best_cut
constexpr float SMALLEST = 1e-32f, LARGEST = 1e32f;

// The cut that ggml takes last, found faster if one cut is better than all others by more than rounding errors.
//
// ggml takes a cut when qx * qx > score * q2 for the score of the one that it took before, which is qx / q2 * qx. Every
// rounding here is one part in 2^24 at most, as long as nothing is below the normal numbers or overflows. So a cut that
// is better than every other by one part in 2^19 is taken whichever was taken before it, and none is taken after it: the
// order does not matter. Cuts no better than CLOSE times the best so far are skipped, by a comparison that may err by
// some parts in 2^24. Of the others, the second best must stay below APART times the best.
template <int N, int WAYS, class One, class Some>
INLINE Cut best_cut(const float *x, float largest, float weights, One one, Some some) {
    float top = 0, second = 0, top_qx = 0, top_q2 = 1;
    int top_first = 0, top_place = 0, top_way = 0;
    const auto consider = [&](int i1, int v, unsigned left, const Sums<F, WAYS> &s) {
        M good = no_lane();
        for (int way = 0; way < WAYS; way++) good = good | (s.qx[way] * s.qx[way] > vec(top * CLOSE) * s.q2[way]);
        if (!(bits(good) & left)) return;
        F gain[WAYS], most = vec(-INFINITY);
        for (int way = 0; way < WAYS; way++) {
            gain[way] = select(mask_of(left), s.qx[way] / s.q2[way] * s.qx[way], vec(-INFINITY));
            most = max_(gain[way], most);
        }
        const float here = largest_of(most);
        if (!(here > top)) {
            second = here > second ? here : second;
            return;
        }
        most = vec(-INFINITY);
        unsigned found = 0;
        for (int way = 0; way < WAYS; way++) {
            const unsigned there = found ? 0 : bits(gain[way] == vec(here));
            if (there) {
                alignas(64) float qx[W], q2[W];
                store(qx, s.qx[way]), store(q2, s.q2[way]);
                const int lane = __builtin_ctz(there);
                found = there & -there;
                top_qx = qx[lane], top_q2 = q2[lane];
                top_first = i1, top_place = v + lane + 1, top_way = way;
                gain[way] = select(mask_of(found), vec(-INFINITY), gain[way]);
            }
            most = max_(gain[way], most);
        }
        const float next = largest_of(most);
        second = top > next ? top : next;
        top = here;
    };
    const auto row = [&](int i1) {
        for (int v = i1 > 0 ? (i1 - 1) / W * W : 0; v < N; v += W) consider(i1, v, lanes_from(i1, v), some(i1, v));
    };
    // Start with two guesses for the first place, the second guess from the result of the first. The sooner the best cut
    // is found, the fewer cuts pass the cheap comparison.
    const int start = less_than<N>(x, -0.34f * largest);
    row(start);
    const int next = less_than<N>(x, -0.5f * std::fabs(top_qx / top_q2));
    if (next != start) row(next);
    for (int i1 = 0; i1 <= N; i1++) {
        if (i1 != start && i1 != next) row(i1);
    }
    const Sums<float, WAYS> none = one(0, 0);
    for (int way = 0; way < WAYS; way++) {
        const float gain = none.qx[way] / none.q2[way] * none.qx[way];
        if (!(gain < top * CLOSE)) second = top;   // no cut at all is best, which is rare
    }
    const float square = top_qx * top_qx;
    if (second < top * APART && top > SMALLEST && top < LARGEST && square > SMALLEST && square < LARGEST &&
        weights > SMALLEST && weights < LARGEST) {
        return {top, top_qx / top_q2, top_first, top_place, top_way};
    }
    return cut_in_order<N>(one, some);
}

}  // namespace
