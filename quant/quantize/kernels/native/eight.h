// Groups of eight weights on a grid of eight dimensions (IQ1, IQ2), and the search for the nearest point.
//
// Here lanes are not superblocks. They are eight neighbors of one code (four with NEON), repeated as often as a vector
// holds them, each time for another scale. One group is searched at a time. A distance is a sum of eight terms. A
// dimension has only three levels, so all possible terms lie in tables, from which the bits of a neighbor's word select.
#pragma once

#include <cfloat>

#include "across.h"
#include "grids.h"

namespace {

constexpr int NEAR = W < 8 ? W : 8;        // neighbors in a vector
constexpr int SCALES = W / NEAR;           // scales in a vector
constexpr int DIMENSIONS = NEAR / 4;       // dimensions of a group in one table, four levels each
constexpr int PARTS = 8 / DIMENSIONS;      // tables for all eight

struct Eight {
    F x[PARTS], w[PARTS];   // every value once for each level, repeated for each scale
};

INLINE Eight eight(const float *x, const float *w) {
    Eight e;
    for (int r = 0; r < PARTS; r++) {
        e.x[r] = spread4(x + r * DIMENSIONS);
        e.w[r] = spread4(w + r * DIMENSIONS);
    }
    return e;
}

// The values of the levels 0, 1 and 2, repeated as in a table. The fourth makes a distance that is never the least:
// infinite, or NaN.
INLINE F level_table(float a, float b, float c) {
    alignas(64) float each[W];
    for (int i = 0; i < W; i += 4) each[i] = a, each[i + 1] = b, each[i + 2] = c, each[i + 3] = INFINITY;
    return load(each);
}

// Where a scale's half of a table of terms begins, for all eight dimensions of a word.
INLINE I second_half() {
    alignas(64) int32_t each[W];
    for (int i = 0; i < W; i++) each[i] = i < NEAR ? 0 : static_cast<int32_t>(0x88888888u);
    return load(each);
}

INLINE I places() {
    alignas(64) int32_t each[W];
    for (int i = 0; i < W; i++) each[i] = i % NEAR;
    return load(each);
}

// Calls a function with the index of each of the eight dimensions in its table, for a vector of words.
template <class Use>
INLINE void each_dimension(I words, Use use) {
    use(0, words);
    use(1, shr<4>(words));
    use(2, shr<8>(words));
    use(3, shr<12>(words));
    use(4, shr<16>(words));
    use(5, shr<20>(words));
    use(6, shr<24>(words));
    use(7, shr<28>(words));
}

// Finds, for N * SCALES scales at once, the first of a group's nearest neighbors by ggml's distance. Only the first
// `real` scales count. Returns false where every distance for one of them overflows: ggml would abort.
template <int N>
INLINE bool nearest_points(const uint32_t *words, uint32_t count, const Eight &e, F levels, const float *scale, int real,
                           uint32_t *found) {
    F term[N][PARTS], nearest[N];
    I where[N];
    for (int n = 0; n < N; n++) {
        const F q = spread_eights(scale + n * SCALES) * levels;
        for (int r = 0; r < PARTS; r++) {
            const F difference = q - e.x[r];
            term[n][r] = e.w[r] * difference * difference;
        }
        nearest[n] = vec(FLT_MAX);
        where[n] = places();
    }
    const I half = second_half();
    I place = places();
    for (uint32_t first = 0; first < count; first += NEAR) {
        const I some = load_eights(reinterpret_cast<const int32_t *>(words) + first) | half;
        F sum[N];
        each_dimension(some, [&](int i, I level) {
            for (int n = 0; n < N; n++) {
                const F t = pick(term[n][i / DIMENSIONS], level);
                sum[n] = i == 0 ? t : sum[n] + t;
            }
        });
        for (int n = 0; n < N; n++) {
            const M nearer = sum[n] < nearest[n];
            nearest[n] = min_(sum[n], nearest[n]);
            where[n] = select(nearer, place, where[n]);
        }
        place = place + vec(NEAR);
    }
    unsigned lost = 0;
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        const F least = least_of_eights(nearest[n]);
        const unsigned all_there = bits(nearest[n] == least);
        lost |= bits(least == vec(FLT_MAX)) << n * W;
        if (count <= NEAR) {   // the lane is the place
            for (int s = 0; s < SCALES; s++) found[n * SCALES + s] = words[__builtin_ctz(all_there >> s * NEAR)];
            continue;
        }
        alignas(64) int32_t at[W];
        store(at, where[n]);
#pragma GCC unroll 4
        for (int s = 0; s < SCALES; s++) {
            const unsigned there = all_there >> s * NEAR & ((1u << NEAR) - 1);
            int32_t first = at[s * NEAR + __builtin_ctz(there)];
            if (there & (there - 1)) {   // some are equally near, and the first of them may be in another lane
                for (unsigned others = there; others; others &= others - 1) {
                    const int32_t other = at[s * NEAR + __builtin_ctz(others)];
                    first = other < first ? other : first;
                }
            }
            found[n * SCALES + s] = words[first];
        }
    }
    const int counted = real < N * SCALES ? real : N * SCALES;
    return !(lost & ((1ull << counted * NEAR) - 1));
}

// The same for one scale, W neighbors at a time.
INLINE bool nearest_point(const uint32_t *words, uint32_t count, const Eight &e, F levels, float scale, uint32_t *found) {
    F term[PARTS];
    const F q = vec(scale) * levels;
    for (int r = 0; r < PARTS; r++) {
        const F difference = q - e.x[r];
        term[r] = e.w[r] * difference * difference;
    }
    F nearest = vec(FLT_MAX);
    I where = vec(0), place = vec(0);
    const I half = second_half();
    for (uint32_t first = 0; first < count; first += W) {
        F sum;
        each_dimension(load(reinterpret_cast<const int32_t *>(words) + first) | half, [&](int i, I level) {
            const F t = pick(term[i / DIMENSIONS], level);
            sum = i == 0 ? t : sum + t;
        });
        where = select(sum < nearest, place, where);
        nearest = min_(sum, nearest);
        place = place + vec(W);
    }
    const F least = least_of_all(nearest);
    alignas(64) int32_t at[W];
    store(at, where);
    const unsigned there = bits(nearest == least);
    int32_t first = at[__builtin_ctz(there)] + __builtin_ctz(there);
    for (unsigned others = there & (there - 1); others; others &= others - 1) {   // equally near, and perhaps before it
        const int32_t other = at[__builtin_ctz(others)] + __builtin_ctz(others);
        first = other < first ? other : first;
    }
    *found = words[first];
    return first_of(least) < FLT_MAX;
}

// For each subset of the eight dimensions, the sum of their powers of 3: a code has one such sum for each level.
struct Powers {
    uint16_t of[256];
    constexpr Powers() : of() {
        for (int set = 0; set < 256; set++) {
            int power = 1, sum = 0;
            for (int i = 0; i < 8; i++, power *= 3) sum += set >> i & 1 ? power : 0;
            of[set] = static_cast<uint16_t>(sum);
        }
    }
};
constexpr Powers POWERS;

INLINE int code_of_word(uint32_t word) {
    int code = 0;
    for (int i = 7; i >= 0; i--) code = 3 * code + static_cast<int>(word >> 4 * i & 3);
    return code;
}

}  // namespace
