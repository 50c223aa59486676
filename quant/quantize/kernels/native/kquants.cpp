// Q2_K, Q4_K, Q5_K (quantize_row_q*_K_impl in ggml-quants.c): superblocks of 256 weights in blocks of 16 or 32. Each
// block has a scale and a minimum, stored as levels of two fp16 numbers of the superblock.
#include "kernel.h"
#include "search.h"

namespace {

constexpr float SAME = 1.0f / 256;

// Blocks that are searched side by side: as many as hide the latency of the sums.
template <int n> constexpr int SIDE_BY_SIDE = W == 16 || n == 32 ? 2 : 4;

INLINE F squares(const F *x, int n) {
    F sum = vec(0.0f);
    for (int i = 0; i < n; i++) sum = sum + x[i] * x[i];
    return sum;
}

// The scale and the minimum of every block of a superblock, and the blocks' weights.
template <int n> struct Blocks {
    static constexpr int N = 256 / n;
    Affine fit[N];
    F sw[N];
};

template <int n, int nmax, class Weigh>
INLINE M fit_blocks(const Group &g, const F *x, float rmin, float rdelta, int steps, Blocks<n> &b, Weigh weigh) {
    constexpr int P = SIDE_BY_SIDE<n>;
    constexpr bool both = n == 16;
    F w[P * n];
    M odd = no_lane();
    for (int j = 0; j < b.N; j += P) {
        for (int p = 0; p < P; p++) {
            if (g.weighted) load_lanes(g.w, (j + p) * n, n, w + p * n);
            weigh(x + (j + p) * n, w + p * n);
            b.sw[j + p] = vec(0.0f);
            for (int i = 0; i < n; i++) b.sw[j + p] = b.sw[j + p] + w[p * n + i];
        }
        if (both && !g.weighted) {
            odd = odd | affine_search<n, nmax, P, both>(x + j * n, w, rmin, rdelta, steps, b.fit + j);
        } else {
            odd = odd | affine_search<n, nmax, P, false>(x + j * n, w, rmin, rdelta, steps, b.fit + j);
        }
    }
    return odd;
}

// The superblock's two scales, and the levels of the blocks' scales and minima.
template <int N> struct Scales {
    F d, dmin;         // as they are stored
    F scale[N], min[N];
};

// With column weights: the scales with the least weighted error.
template <int n> INLINE M search_scales(const Blocks<n> &b, int top, Scales<256 / n> &s) {
    constexpr int N = 256 / n;
    F x[2][N], level[2][N], d[2];
    for (int j = 0; j < N; j++) {
        x[0][j] = b.fit[j].scale;
        x[1][j] = b.fit[j].shift;
    }
    const M odd = positive_search<N, 2>(x, b.sw, top, level, d);
    s.d = d[0];
    s.dmin = d[1];
    for (int j = 0; j < N; j++) {
        s.scale[j] = level[0][j];
        s.min[j] = level[1][j];
    }
    return odd | ~finite(d[0]) | ~finite(d[1]);
}

// Without: the largest scale gets the top level.
template <int n> INLINE M divide_scales(const Blocks<n> &b, int top, Scales<256 / n> &s) {
    F largest = vec(0.0f), largest_min = vec(0.0f);
    for (int j = 0; j < b.N; j++) {
        largest = max_(b.fit[j].scale, largest);
        largest_min = max_(b.fit[j].shift, largest_min);
    }
    const F upper = vec(MAGIC + top), t = vec(static_cast<float>(top));
    const F inverse = select(largest > vec(0.0f), t / largest, vec(0.0f));
    const F inverse_min = select(largest_min > vec(0.0f), t / largest_min, vec(0.0f));
    for (int j = 0; j < b.N; j++) {
        s.scale[j] = rounded(inverse * b.fit[j].scale, vec(MAGIC), upper);
        s.min[j] = rounded(inverse_min * b.fit[j].shift, vec(MAGIC), upper);
    }
    s.d = largest / t;
    s.dmin = largest_min / t;
    return ~roundable(inverse * largest) | ~roundable(inverse_min * largest_min);
}

// The level of every weight with the scales as they are stored. Where a scale is stored as zero, the levels of the
// search stay.
template <int n, int nmax>
INLINE M levels(const F *x, const Blocks<n> &b, const Scales<256 / n> &s, I *level) {
    const F d = from_half(to_half(s.d)), dmin = from_half(to_half(s.dmin));
    M odd = no_lane();
    for (int j = 0; j < b.N; j++) {
        const F scale = d * s.scale[j], min = dmin * s.min[j];
        const M none = scale == vec(0.0f);
        const Affine &a = b.fit[j];
        odd = odd | ~(none | (roundable((a.low + min) / scale) & roundable((a.high + min) / scale)));
        for (int i = 0; i < n; i++) {
            const F l = rounded((x[j * n + i] + min) / scale, vec(MAGIC), vec(MAGIC + nmax));
            level[j * n + i] = trunc(l);
        }
        if (!any(none)) continue;
        for (int i = 0; i < n; i++) {
            level[j * n + i] = select(none, trunc(affine_level<nmax>(a, x[j * n + i])), level[j * n + i]);
        }
    }
    return odd;
}

INLINE M q2_k(const Group &g) {
    F x[256];
    const F sum = load_squares(g.x, 0, 256, x), sigma2 = sum * vec(SAME);
    Blocks<16> b;
    Scales<16> s;
    M odd = ~finite(sum);
    if (g.weighted) {
        const auto weigh = [&](const F *x, F *w) {
            for (int i = 0; i < 16; i++) w[i] = w[i] * sqrt(sigma2 + x[i] * x[i]);
        };
        odd = odd | fit_blocks<16, 3>(g, x, -0.9f, 0.05f, 36, b, weigh);
        odd = odd | search_scales(b, 15, s);
    } else {
        const auto weigh = [](const F *x, F *w) {
            for (int i = 0; i < 16; i++) w[i] = abs(x[i]);
        };
        odd = odd | fit_blocks<16, 3>(g, x, -0.5f, 0.1f, 15, b, weigh);
        odd = odd | divide_scales(b, 15, s);
    }
    I level[256], bytes[64];
    odd = odd | levels<16, 3>(x, b, s, level);

    for (int j = 0; j < 16; j++) bytes[j] = trunc(s.scale[j]) | shl<4>(trunc(s.min[j]));
    store_bytes(bytes, 16, g.out, 0);
    for (int k = 0; k < 64; k++) {
        const I *l = level + k / 32 * 128 + k % 32;
        bytes[k] = l[0] | shl<2>(l[32]) | shl<4>(l[64]) | shl<6>(l[96]);
    }
    store_bytes(bytes, 64, g.out, 16);
    store_half(to_half(s.d), g.out, 80);
    store_half(to_half(s.dmin), g.out, 82);
    return odd;
}

// Q4_K and Q5_K except for packing the levels. The 12 bytes of scales and minima hold six bits of each.
template <int nmax> INLINE M q45_k(const Group &g, float rdelta, float rmin, int steps, I *level) {
    F x[256];
    const F sum = load_squares(g.x, 0, 256, x), sigma2 = vec(2.0f) * sum * vec(SAME);
    Blocks<32> b;
    Scales<8> s;
    M odd = ~finite(vec(2.0f) * sum);
    if (g.weighted) {
        const auto weigh = [&](const F *x, F *w) {
            for (int i = 0; i < 32; i++) w[i] = w[i] * sqrt(sigma2 + x[i] * x[i]);
        };
        odd = odd | fit_blocks<32, nmax>(g, x, -0.9f, 0.05f, 36, b, weigh);
        odd = odd | search_scales(b, 63, s);
    } else {
        const auto weigh = [](const F *x, F *w) {
            const F mean = sqrt(squares(x, 32) * vec(1.0f / 32));
            for (int i = 0; i < 32; i++) w[i] = mean + abs(x[i]);
        };
        odd = odd | fit_blocks<32, nmax>(g, x, rmin, rdelta, steps, b, weigh);
        odd = odd | divide_scales(b, 63, s);
    }
    odd = odd | levels<32, nmax>(x, b, s, level);

    I bytes[12];
    for (int j = 0; j < 4; j++) {
        const I sc = trunc(s.scale[j]), m = trunc(s.min[j]), sc4 = trunc(s.scale[j + 4]), m4 = trunc(s.min[j + 4]);
        bytes[j] = sc | shl<6>(shr<4>(sc4));
        bytes[j + 4] = m | shl<6>(shr<4>(m4));
        bytes[j + 8] = (sc4 & vec(15)) | shl<4>(m4 & vec(15));
    }
    store_half(to_half(s.d), g.out, 0);
    store_half(to_half(s.dmin), g.out, 2);
    store_bytes(bytes, 12, g.out, 4);
    return odd;
}

INLINE M q4_k(const Group &g) {
    I level[256], bytes[128];
    const M odd = q45_k<15>(g, 0.1f, -1.0f, 20, level);
    for (int k = 0; k < 128; k++) {
        const I *l = level + k / 32 * 64 + k % 32;
        bytes[k] = l[0] | shl<4>(l[32]);
    }
    store_bytes(bytes, 128, g.out, 16);
    return odd;
}

INLINE M q5_k(const Group &g) {
    I level[256], bytes[128], high[32];
    const M odd = q45_k<31>(g, 0.1f, -0.5f, 15, level);
    for (int k = 0; k < 128; k++) {
        const I *l = level + k / 32 * 64 + k % 32;
        bytes[k] = (l[0] & vec(15)) | shl<4>(l[32] & vec(15));
    }
    for (int k = 0; k < 32; k++) {
        const I *l = level + k;
        high[k] = shr<4>(l[0]) | shl<1>(shr<4>(l[32])) | shl<2>(shr<4>(l[64])) | shl<3>(shr<4>(l[96])) |
                  shl<4>(shr<4>(l[128])) | shl<5>(shr<4>(l[160])) | shl<6>(shr<4>(l[192])) | shl<7>(shr<4>(l[224]));
    }
    store_bytes(high, 32, g.out, 16);
    store_bytes(bytes, 128, g.out, 48);
    return odd;
}

}  // namespace

KERNEL(q2_k) { run<10, 256, 84>(call, q2_k); }
KERNEL(q4_k) { run<12, 256, 144>(call, q4_k); }
KERNEL(q5_k) { run<13, 256, 176>(call, q5_k); }
