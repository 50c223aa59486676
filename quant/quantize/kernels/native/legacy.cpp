// Q4_0, Q4_1, Q5_0, Q5_1 with column weights: blocks of 32 weights with a scale, or a scale and a minimum. The weight of
// an error depends on the mean square of the whole row, so an odd block leaves its row to ggml.
//
// Without column weights ggml only rounds, at about the speed of memory. Those calls are left to ggml.
#include "kernel.h"
#include "search.h"

namespace {

// The mean squares of W rows, whose lengths are a multiple of 32.
INLINE void mean_squares(const float *const *rows, int64_t row, float *to) {
    F x[32], sum = vec(0.0f);
    for (int64_t i = 0; i < row; i += 32) {
        load_lanes(rows, i, 32, x);
        for (int k = 0; k < 32; k++) sum = sum + x[k] * x[k];
    }
    storeu(to, sum / vec(static_cast<float>(row)));
}

// Stores levels as ggml does: four bits of each in 16 bytes, the first half of the block in the low bits. The fifth bits,
// if there are any, come before them in the order of the block.
template <bool fifth> INLINE void store_levels(I *level, uint8_t *const *to, int offset) {
    if (fifth) {
        I high = vec(0);
        for (int i = 0; i < 32; i++) high = shr<1>(high) | shl<31>(shr<4>(level[i]));
        store_words(&high, 1, to, offset);
        offset += 4;
    }
    for (int i = 0; i < 16; i++) level[i] = (level[i] & vec(15)) | shl<4>(level[i + 16] & vec(15));
    store_bytes(level, 16, to, offset);
}

// The loop of run() in kernel.h for these types: W rows at a time, and W of their blocks at a time.
template <int type, int bytes, class Work> INLINE void run_rows(const Call &call, Work work) {
    const int64_t per_row = call.row / 32;
    if (!call.weights) {
        call.chunk(type, call.rows, call.out, 0, call.nrows, call.row, nullptr);
        return;
    }
    uint8_t nowhere[bytes];
    for (int64_t first = 0; first < call.nrows; first += W) {
        const int64_t rows = call.nrows - first < W ? call.nrows - first : W, blocks = rows * per_row;
        const float *x = call.rows + first * call.row, *start[W];
        uint8_t *out = call.out + first * per_row * bytes;
        float mean[W];
        for (int l = 0; l < W; l++) start[l] = x + (l < rows ? l : rows - 1) * call.row;
        mean_squares(start, call.row, mean);

        uint32_t odd_rows = 0;
        for (int64_t b = 0; b < blocks; b += W) {
            Group g;
            g.lanes = blocks - b < W ? static_cast<int>(blocks - b) : W;
            g.weighted = true;
            g.counts = call.counts;
            alignas(64) float sigma2[W];
            int of[W];
            for (int l = 0; l < W; l++) {
                const int64_t k = l < g.lanes ? b + l : blocks - 1;
                of[l] = static_cast<int>(k / per_row);
                g.x[l] = x + k * 32;
                g.w[l] = call.weights + k % per_row * 32;
                g.out[l] = l < g.lanes ? out + k * bytes : nowhere;
                sigma2[l] = mean[of[l]];
            }
            F xs[32], w[32];
            load_lanes(g.x, 0, 32, xs);
            load_lanes(g.w, 0, 32, w);
            const F s = load(sigma2);
            for (int i = 0; i < 32; i++) w[i] = w[i] * sqrt(s + xs[i] * xs[i]);
            const unsigned odd = bits(work(g, xs, w) | ~finite(s));
            for (int l = 0; l < g.lanes; l++) odd_rows |= (odd >> l & 1) << of[l];
        }
        for (; odd_rows; odd_rows &= odd_rows - 1) {
            const int r = __builtin_ctz(odd_rows);
            call.chunk(type, x + r * call.row, out + r * per_row * bytes, 0, 1, call.row, call.weights);
            call.counts->odd++;
        }
    }
}

template <int nmax> INLINE M symmetric(const Group &g, const F *x, const F *w) {
    const Symmetric s = symmetric_search<32, nmax>(x, w);
    I level[32];
    for (int i = 0; i < 32; i++) level[i] = trunc(symmetric_level<nmax>(s, x[i]));
    store_half(to_half(s.scale), g.out, 0);
    store_levels<nmax == 16>(level, g.out, 2);
    return ~finite(s.scale) | ~finite(s.largest);
}

template <int nmax> INLINE M affine(const Group &g, const F *x, const F *w) {
    Affine a;
    const M odd = affine_search<32, nmax, 1, false>(x, w, -0.9f, 0.05f, 36, &a);
    I level[32];
    for (int i = 0; i < 32; i++) level[i] = trunc(affine_level<nmax>(a, x[i]));
    store_half(to_half(a.scale), g.out, 0);
    store_half(to_half(-a.shift), g.out, 2);
    store_levels<nmax == 31>(level, g.out, 4);
    return odd;
}

}  // namespace

KERNEL(q4_0) { run_rows<2, 18>(call, symmetric<8>); }
KERNEL(q5_0) { run_rows<6, 22>(call, symmetric<16>); }
KERNEL(q4_1) { run_rows<3, 20>(call, affine<15>); }
KERNEL(q5_1) { run_rows<7, 24>(call, affine<31>); }
