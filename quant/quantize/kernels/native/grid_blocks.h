// What the grid types have in common: superblocks of 256 weights in blocks of 16 or 32, each with a scale, and with
// signs and magnitudes stored apart (IQ2, IQ3).
//
// Blocks are done one after another; each function says what its lanes are. All sums run in ggml's order. A type is a
// struct of constants:
//   NAME         the grid
//   N            weights in a block
//   EMPTY        a block whose weights are all below it is stored as zeros
//   EVEN_SIGNS   whether only seven of eight signs are stored, and the eighth makes the number of negative ones even
//   SIGMA        factor of the mean square
//   WEIGHTED     whether column weights are required
//   ROOTS        whether their square roots are needed
//   unweighted   the weight of an error without column weights
#pragma once

#include "across.h"
#include "grids.h"
#include "kernel.h"

namespace {

constexpr int SUPER = 256;

// A block of 16 or 32 weights in work. The arrays are longer than the block because whole vectors are loaded from them.
struct alignas(64) Block {
    float x[48];      // magnitudes
    float w[48];      // weights of the squared errors
    float root[48];   // square roots of w
    float wx[48];     // w * x
    uint8_t signs[4];
    float largest, smallest;   // of x
};

struct Done {
    float scale;
    uint16_t point[8];   // numbers of grid points
    uint8_t signs[4];
    bool empty;
};

// In each group of eight with an odd number of negative weights, the first with the least weighted square: a bit each.
template <class T>
INLINE uint32_t wrong_signs(const float *x, const Block &b, uint32_t signs) {
    alignas(64) float loss[T::N];
    uint32_t least = 0, wrong = 0;
    for (int i = 0; i < T::N; i += W) {
        const F v = loadu(x + i), l = load(b.w + i) * v * v;
        if (W < 8) store(loss + i, l);
        else least |= bits(l == least_of_eights(l)) << i;
    }
    for (int k = 0; k < T::N; k += 8) {
        if (!__builtin_parity(signs >> k & 255)) continue;
        if (W < 8) {
            int first = k;
            for (int i = k + 1; i < k + 8; i++) first = loss[i] < loss[first] ? i : first;
            wrong |= 1u << first;
        } else {
            const uint32_t here = least >> k & 255;
            wrong |= (here & -here) << k;
        }
    }
    return wrong;
}

// Separates magnitudes and signs. Eight signs go into a byte. Where a format stores seven and derives the eighth, an odd
// number of signs is made even at the weight that counts least, whose magnitude is negative here.
template <class T>
INLINE void take_signs(const float *from, Block &b) {
    uint32_t signs = 0, wrong = 0;
    for (int i = 0; i < T::N; i += W) signs |= bits(loadu(from + i) < vec(0.0f)) << i;
    if (T::EVEN_SIGNS) wrong = wrong_signs<T>(from, b, signs);
    signs ^= wrong;
    F most = vec(-INFINITY), fewest = vec(INFINITY);
    for (int i = 0; i < T::N; i += W) {
        const F v = loadu(from + i);
        const F x = select(mask_of(signs >> i), -v, v);
        most = max_(x, most);
        fewest = min_(x, fewest);
        store(b.x + i, x);
    }
    for (int k = 0; k < T::N / 8; k++) b.signs[k] = static_cast<uint8_t>(signs >> 8 * k & (T::EVEN_SIGNS ? 127 : 255));
    b.largest = largest_of(most);
    b.smallest = T::EVEN_SIGNS ? -largest_of(-fewest) : 0.0f;
}

// The weights of the squared errors. Returns false if one is negative or not finite.
template <class T>
INLINE bool weigh(const float *x, const float *weights, float sigma2, Block &b) {
    M good = ~no_lane();
    for (int i = 0; i < T::N; i += W) {
        const F v = loadu(x + i);
        const F w = weights ? loadu(weights + i) * sqrt(vec(sigma2) + v * v) : T::unweighted(vec(sigma2), v);
        good = good & (w >= vec(0.0f)) & (w < vec(INFINITY));
        store(b.w + i, w);
        if (T::ROOTS) store(b.root + i, sqrt(w));
    }
    return all(good);
}

INLINE uint16_t half(float value) {
    if (value != value) return std::signbit(value) ? 0xfe00 : 0x7e00;
    alignas(64) int32_t lanes[W];
    store(lanes, to_half(vec(value)));
    return static_cast<uint16_t>(lanes[0]);
}

INLINE int nearest(float v) {
    v += MAGIC;
    int32_t b;
    std::memcpy(&b, &v, 4);
    return (b & 0x007fffff) - 0x00400000;
}

// The bits of a block's scale.
INLINE unsigned scale_bits(float id, float scale, int most = 15) {
    const int l = nearest(0.5f * (id * scale - 1));
    return static_cast<unsigned>(l < 0 ? 0 : l > most ? most : l);
}

// A superblock whose blocks are quantized.
struct Super {
    const float *x, *weights;
    float sigma2;
    const Done *done;
    float largest;   // of the blocks' scales
};

template <class T, int bytes, class Quantize, class Pack>
INLINE void superblocks(const Call &call, Quantize quantize, Pack pack) {
    const Grid &g = grid(T::NAME);
    const int64_t per_row = call.row / SUPER, blocks = call.nrows * per_row;
    constexpr int BLOCKS = SUPER / T::N;
    for (int64_t first = 0; first < blocks; first += W) {
        // The sums of squares of W superblocks side by side, each over its 256 weights in order.
        const float *rows[W];
        for (int l = 0; l < W; l++) rows[l] = call.rows + (first + l < blocks ? first + l : blocks - 1) * SUPER;
        F sum = vec(0.0f), some[W];
        for (int i = 0; i < SUPER; i += W) {
            load_transposed(rows, i, some);
            for (int j = 0; j < W; j++) sum = sum + some[j] * some[j];
        }
        alignas(64) float sigma2[W];
        store(sigma2, vec(T::SIGMA) * sum / vec(256.0f));
        for (int64_t at = first; at < first + W && at < blocks; at++) {
            const float *const x = call.rows + at * SUPER;
            const float *const weights = call.weights ? call.weights + at % per_row * SUPER : nullptr;
            uint8_t *const out = call.out + at * bytes;
            Done done[BLOCKS];
            float largest = 0;
            bool well = weights || !T::WEIGHTED;
            for (int b = 0; b < BLOCKS && well; b++) {
                well = quantize(g, x + T::N * b, weights ? weights + T::N * b : nullptr, sigma2[at - first], done[b]);
                largest = largest > done[b].scale ? largest : done[b].scale;
            }
            std::memset(out, 0, bytes);
            call.counts->refused += !well;
            if (well) pack(Super{x, weights, sigma2[at - first], done, largest}, *call.counts, out);
        }
    }
}

}  // namespace
