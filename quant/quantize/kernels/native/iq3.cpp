// IQ3_XXS and IQ3_S: groups of four weights on a grid of four dimensions with eight levels each.
//
// The lists of neighbors are short and many scales are tried, so lanes are scales here, in the search too. What a
// dimension adds to a distance is tabulated for every level and every scale. The neighbors of a code are tried one by
// one, for all consecutive scales that lead to that code (quantize_row_iq3_*_impl in ggml-quants.c).
#include <cfloat>

#include "grid_blocks.h"

namespace {

constexpr int LEVELS = 8, GROUPS = 8, MOST_TRIES = 32;
constexpr int MOST_NEIGHBOURS = 48;   // 38 in IQ3_S, filled up to a multiple of 16

struct Xxs {
    static constexpr GridName NAME = GridName::iq3_xxs;
    static constexpr int N = 32, TRIES = 31, MIDDLE = 15;
    static constexpr float EMPTY = 1e-8f, SIGMA = 2.0f;
    static constexpr bool EVEN_SIGNS = true, ALL_AGAIN = false, WEIGHTED = false, ROOTS = true;
    static F unweighted(F, F v) { return v * v; }
};
struct S {
    static constexpr GridName NAME = GridName::iq3_s;
    static constexpr int N = 32, TRIES = 19, MIDDLE = 9;
    static constexpr float EMPTY = FLT_TRUE_MIN, SIGMA = 2.0f;   // nothing but zeros is less
    static constexpr bool EVEN_SIGNS = false, ALL_AGAIN = true, WEIGHTED = false, ROOTS = true;
    static F unweighted(F, F v) { return v * v; }
};

constexpr float STANDS_FOR[16] = {1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15};

// ggml's level of a weight, 0 … 7, for y = 0.5 * (p - 1): rounded by adding MAGIC, with the bits interpreted as ggml
// does where y is out of range.
INLINE I level_of(F p) {
    const I l = (bits_of(vec(0.5f) * (p - vec(1.0f)) + vec(MAGIC)) & vec(0x007fffff)) - vec(0x00400000);
    return min_(max_(l, vec(0)), vec(LEVELS - 1));
}

// The same where nothing is out of range. Then halving can be skipped: p - 1 plus twice MAGIC has the same bits as half
// of it plus MAGIC. `edge` is raised to the distance of p - 1 from its rounded value; 1 is the edge between two levels.
INLINE I level_in_range(F p, F &edge) {
    const F y = min_(max_(p - vec(1.0f), vec(0.0f)), vec(14.0f)), rounded_y = y + vec(2 * MAGIC);
    edge = max_(abs(y - (rounded_y - vec(2 * MAGIC))), edge);
    return bits_of(rounded_y) & vec(7);
}

// Closer to the edge than this, rounding errors might decide which of two points on either side of it is nearer. What is
// compared is scale * q - x in floats, whose error is at most some 2e-6 of the scale.
constexpr float EDGE = 1 - 2e-5f;

// The nearest neighbor of one group with one scale; the lanes are neighbors.
INLINE bool nearest_point(const uint32_t *words, uint32_t count, const float *x, const float *w, float scale,
                          uint32_t *found) {
    if (W < 8) {
        float least = FLT_MAX;
        *found = words[0];
        for (uint32_t j = 0; j < count; j++) {
            float sum = 0;
            for (int i = 0; i < 4; i++) {
                const float difference = scale * static_cast<float>(2 * (words[j] >> (8 * i + 4) & 7) + 1) - x[i];
                sum += w[i] * difference * difference;
            }
            if (sum < least) least = sum, *found = words[j];
        }
        return least < FLT_MAX;
    }
    const F q = vec(scale) * loadu(STANDS_FOR);
    F term[4];
    for (int i = 0; i < 4; i++) {
        const F difference = q - vec(x[i]);
        term[i] = vec(w[i]) * difference * difference;
    }
    F sum[MOST_NEIGHBOURS / W], nearest = vec(FLT_MAX);
    for (uint32_t j = 0; j < count; j += W) {
        const I some = loadu(reinterpret_cast<const int32_t *>(words) + j);
        const F all = pick(term[0], shr<4>(some)) + pick(term[1], shr<12>(some)) + pick(term[2], shr<20>(some)) +
                      pick(term[3], shr<28>(some));
        sum[j / W] = select(mask_of(count - j < W ? (1u << (count - j)) - 1 : ~0u), all, vec(INFINITY));
        nearest = min_(sum[j / W], nearest);
    }
    nearest = least_of_all(nearest);
    uint32_t j = 0;
    unsigned there = bits(sum[0] == nearest);
    while (!there && (j += W) < count) there = bits(sum[j / W] == nearest);
    *found = words[there ? j + static_cast<uint32_t>(__builtin_ctz(there)) : 0];
    return !any(nearest == vec(FLT_MAX));
}

template <class T>
struct alignas(64) Tries {
    static constexpr int V = (T::TRIES + W - 1) / W;
    float id[V * W], scale[V * W];
    float levels[LEVELS][V * W];        // scale times the value of a level
    float terms[4][LEVELS][MOST_TRIES]; // of the current group
    I code[V + 1];                      // of the current group
    int32_t words[GROUPS][V * W];       // the points
    uint32_t on_grid[GROUPS];           // a bit for each try
};

// A byte of a word is its level times 16. The terms of a level begin eight times as many bytes after those of level 0,
// an address that the processor computes as part of the load.
INLINE F terms_at(const char *terms, uint8_t byte) {
    static_assert(MOST_TRIES * sizeof(float) == 8 * 16);
    return load(reinterpret_cast<const float *>(terms + size_t{8} * byte));
}

// The points of a group for every try. Returns false where all distances overflow: ggml finds none then, and aborts.
template <class T>
INLINE bool try_points(const Grid &g, const Cell *by_code, const Block &b, int k, Tries<T> &t) {
    constexpr int V = Tries<T>::V;
    // A bit for each try that is the last of a run, in which all tries have the same code and lie in one vector.
    uint32_t last = 1u << (T::TRIES - 1);
    alignas(64) int32_t code[V * W];
    for (int v = 0; v < V; v++) {
        last |= (bits(~(t.code[v] == following(t.code[v], t.code[v + 1]))) | 1u << (W - 1)) << v * W;
        store(code + v * W, t.code[v]);
        store(t.words[k] + v * W, vec(0));
    }
    last &= (2u << (T::TRIES - 1)) - 1;
    Cell cells[T::TRIES];
    uint32_t needed = 0;   // the levels of each dimension that are needed
    int runs = 0, start = 0;
    for (uint32_t ends = last; ends; ends &= ends - 1) {
        cells[runs] = by_code[code[start]];
        needed |= cells[runs++].levels;
        start = __builtin_ctz(ends) + 1;
    }
    for (; needed; needed &= needed - 1) {
        const int i = __builtin_ctz(needed) / LEVELS, l = __builtin_ctz(needed) % LEVELS;
        const F x = vec(b.x[4 * k + i]), w = vec(b.root[4 * k + i]);
        for (int v = 0; v < V * W; v += W) {
            const F difference = load(t.levels[l] + v) - x;
            store(t.terms[i][l] + v, w * difference * difference);
        }
    }
    M lost = no_lane();
    uint32_t on_grid = 0;
    for (int first = 0, run = 0; last; last &= last - 1) {
        const int end = __builtin_ctz(last) + 1, v = first / W * W;
        const Cell cell = cells[run++];
        const uint32_t *const near = g.words + cell.first;
        on_grid |= cell.count ? 0 : (2u << (end - 1)) - (1u << first);
        F nearest = vec(FLT_MAX);
        I point = vec(static_cast<int32_t>(near[0]));
        const char *const terms = reinterpret_cast<const char *>(t.terms) + v * sizeof(float);
        const auto *word = reinterpret_cast<const uint8_t *>(near);
        for (uint32_t j = 0; j < cell.count; j++, word += 4) {
            F sum = terms_at(terms, word[0]);
            for (int i = 1; i < 4; i++) sum = sum + terms_at(terms + i * sizeof t.terms[0], word[i]);
            point = select(sum < nearest, vec(static_cast<int32_t>(near[j])), point);
            nearest = min_(sum, nearest);
        }
        const M mine = mask_of(((1u << (end - v)) - 1) & ~((1u << (first - v)) - 1));
        lost = lost | (mine & (nearest == vec(cell.count ? FLT_MAX : -1.0f)));
        store(t.words[k] + v, select(mine, point, load(t.words[k] + v)));
        first = end;
    }
    t.on_grid[k] = on_grid;
    return !any(lost);
}

// The two sums over a block for every try: of w * x * q and of w * q * q.
template <class T>
INLINE void sum_up(const Block &b, const Tries<T> &t, F *qx, F *q2) {
    constexpr int V = Tries<T>::V;
    for (int v = 0; v < V; v++) qx[v] = q2[v] = vec(0.0f);
    const F stands_for = loadu(STANDS_FOR);
    for (int k = 0; k < GROUPS; k++) {
        I words[V];
        for (int v = 0; v < V; v++) words[v] = shr<4>(load(t.words[k] + v * W));
        for (int i = 4 * k; i < 4 * k + 4; i++) {
            const F wxq = vec(b.wx[i]) * stands_for, wqq = vec(b.w[i]) * stands_for * stands_for;
            for (int v = 0; v < V; v++) {
                if (W >= 8) {
                    qx[v] = qx[v] + pick(wxq, words[v]);
                    q2[v] = q2[v] + pick(wqq, words[v]);
                } else {   // a vector does not hold all eight levels
                    const F q = float_of(shl<1>(words[v] & vec(7)) + vec(1));
                    qx[v] = qx[v] + vec(b.wx[i]) * q;
                    q2[v] = q2[v] + vec(b.w[i]) * q * q;
                }
                words[v] = shr<8>(words[v]);
            }
        }
    }
}

INLINE int code_of_word(uint32_t word) {
    return static_cast<int>((word >> 4 & 7) | (word >> 12 & 7) << 3 | (word >> 20 & 7) << 6 | (word >> 28 & 7) << 9);
}

// The codes of a group with every scale: three bits per weight. Returns the cells in which to look them up.
template <class T>
INLINE const Cell *try_codes(const Grid &g, const Block &b, int k, bool in_range, Tries<T> &t) {
    F edge = vec(0.0f);
    for (int v = 0; v < Tries<T>::V; v++) {
        const F id = load(t.id + v * W);
        I code = vec(0);
        for (int i = 3; i >= 0; i--) {
            const F p = id * vec(b.x[4 * k + i]);
            code = shl<3>(code) | (in_range ? level_in_range(p, edge) : level_of(p));
        }
        t.code[v] = code;
    }
    t.code[Tries<T>::V] = vec(0);
    return in_range && !any(edge > vec(EDGE)) ? g.clear : g.cells;
}

// Quantizes a block. Returns false where ggml would abort.
template <class T>
INLINE bool quantize(const Grid &g, const float *x, const float *weights, float sigma2, Done &done) {
    constexpr int V = Tries<T>::V;
    Block b;
    if (!weigh<T>(x, weights, sigma2, b)) return false;
    take_signs<T>(x, b);
    done.scale = 0;
    done.empty = b.largest < T::EMPTY;
    for (int k = 0; k < GROUPS; k++) done.point[k] = 0, done.signs[k / 2] = done.empty ? 0 : b.signs[k / 2];
    if (done.empty) return true;
    for (int i = 0; i < T::N; i += W) store(b.wx + i, load(b.w + i) * load(b.x + i));

    Tries<T> t;
    for (int i = 0; i < V * W; i++) t.id[i] = 15 + static_cast<float>(i - T::MIDDLE) * 0.2f;
    for (int v = 0; v < V * W; v += W) {
        const F id = load(t.id + v) / vec(b.largest), scale = vec(1.0f) / id;
        store(t.id + v, id);
        store(t.scale + v, scale);
        for (int l = 0; l < LEVELS; l++) store(t.levels[l] + v, scale * vec(STANDS_FOR[l]));
    }
    const bool in_range = b.largest > 1e-35f && b.smallest >= -1e5f * b.largest;
    bool well = true;
    for (int k = 0; k < GROUPS; k++) {
        const Cell *const cells = in_range ? try_codes(g, b, k, true, t) : try_codes(g, b, k, false, t);
        well &= try_points(g, cells, b, k, t);
    }
    if (!well) return false;

    alignas(64) float qx2[V * W], q2[V * W], by[V * W], gain[V * W];
    F sumqx_by[V], sumq2_by[V];
    sum_up(b, t, sumqx_by, sumq2_by);
    for (int v = 0; v < V; v++) {
        const F qx = sumqx_by[v], d = qx / sumq2_by[v];
        store(qx2 + v * W, qx * qx);
        store(q2 + v * W, sumq2_by[v]);
        store(by + v * W, d);
        store(gain + v * W, d * qx);
    }
    float best = 0, scale = b.largest / 15;
    int chosen = -1;
    for (int i = 0; i < T::TRIES; i++) {
        if (q2[i] > 0 && qx2[i] > best * q2[i]) scale = by[i], best = gain[i], chosen = i;
    }
    uint32_t word[GROUPS], again = 0;
    for (int k = 0; k < GROUPS; k++) {
        word[k] = chosen < 0 ? g.words[0] : static_cast<uint32_t>(t.words[k][chosen]);
        const bool off = chosen < 0 ? T::ALL_AGAIN : !(t.on_grid[k] >> chosen & 1);
        again |= static_cast<uint32_t>(off) << k;
    }
    if (again && scale > 0) {
        if (T::ALL_AGAIN) again = 255;
        const float id = 1 / scale;
        alignas(64) int32_t level[32];
        for (int i = 0; i < 32; i += W) store(level + i, level_of(vec(id) * load(b.x + i)));
        for (; again; again &= again - 1) {
            const int k = __builtin_ctz(again);
            const int32_t *const l = level + 4 * k;
            const Cell cell = g.cells[l[0] | l[1] << 3 | l[2] << 6 | l[3] << 9];
            word[k] = g.words[cell.first];
            if (cell.count) {
                well &= nearest_point(g.words + cell.first, cell.count, b.x + 4 * k, b.root + 4 * k, scale, word + k);
            }
        }
        float sumqx = 0, sumq2 = 0;
        for (int i = 0; i < T::N; i++) {
            const float q = STANDS_FOR[word[i / 4] >> (8 * (i % 4) + 4) & 7];
            sumqx += b.wx[i] * q;
            sumq2 += b.w[i] * q * q;
        }
        if (sumq2 > 0) scale = sumqx / sumq2;
    }
    if (scale < 0) {
        scale = -scale;
        for (int k = 0; k < 4; k++) done.signs[k] = static_cast<uint8_t>(~done.signs[k] & (T::EVEN_SIGNS ? 127 : 255));
    }
    done.scale = scale;
    for (int k = 0; k < GROUPS; k++) done.point[k] = static_cast<uint16_t>(g.cells[code_of_word(word[k])].first);
    return well && scale >= 0;
}

INLINE void pack_xxs(const Super &s, Counts &, uint8_t *out) {
    if (s.largest == 0) return;
    const float d = s.largest / 31, id = 1 / d;
    const uint16_t stored = half(d * 1.0125f);
    std::memcpy(out, &stored, 2);
    for (int b = 0; b < 8; b++) {
        uint32_t signs = scale_bits(id, s.done[b].scale) << 28;
        for (int k = 0; k < 8; k++) out[2 + 8 * b + k] = static_cast<uint8_t>(s.done[b].point[k]);
        for (int k = 0; k < 4; k++) signs |= static_cast<uint32_t>(s.done[b].signs[k]) << 7 * k;
        std::memcpy(out + 66 + 4 * b, &signs, 4);
    }
}

// Packs as ggml does, with its fault: a block of zeros does not advance the pointers to points and signs, so those of the
// blocks after it are stored one block too early. The high bits of the points and the scales are stored correctly.
INLINE void pack_s(const Super &s, Counts &counts, uint8_t *out) {
    const float d = s.largest / 31, id = 1 / d;
    const uint16_t stored = s.largest == 0 ? 0 : half(d * 1.033f);
    std::memcpy(out, &stored, 2);
    int place = 0;
    for (int b = 0; b < 8; b++) {
        if (s.largest != 0) out[106 + b / 2] |= static_cast<uint8_t>(scale_bits(id, s.done[b].scale) << 4 * (b % 2));
        if (s.done[b].empty) continue;
        for (int k = 0; k < 8; k++) {
            out[2 + 8 * place + k] = static_cast<uint8_t>(s.done[b].point[k]);
            out[66 + b] |= static_cast<uint8_t>(s.done[b].point[k] >> 8 << k);
        }
        std::memcpy(out + 74 + 4 * place, s.done[b].signs, 4);
        place++;
    }
    bool faulty = false;
    for (int b = 1; b < 8; b++) faulty |= s.done[b - 1].empty && !s.done[b].empty;
    counts.faulty += faulty;
}

}  // namespace

KERNEL(iq3_xxs) { superblocks<Xxs, 98>(call, quantize<Xxs>, pack_xxs); }
KERNEL(iq3_s) { superblocks<S, 110>(call, quantize<S>, pack_s); }
