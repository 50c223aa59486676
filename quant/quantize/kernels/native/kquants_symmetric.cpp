// Q3_K and Q6_K (quantize_row_q3_K_impl, quantize_row_q6_K_impl in ggml-quants.c): superblocks of 256 weights in blocks
// of 16. Each block has a scale, stored as a level of one fp16 number of the superblock.
#include "kernel.h"
#include "search.h"

namespace {

// The weights of the squared errors in a block.
INLINE void weigh(const Group &g, int offset, F sigma2, const F *x, F *w) {
    if (g.weighted) load_lanes(g.w, offset, 16, w);
    for (int i = 0; i < 16; i++) w[i] = g.weighted ? w[i] * sqrt(sigma2 + x[i] * x[i]) : x[i] * x[i];
}

// The levels of 16 weights with magnitudes up to `largest`, for a scale as it is stored. Where it is stored as zero, the
// levels of the search stay.
template <int nmax, class Searched> INLINE M levels(const F *x, F largest, F scale, I *level, Searched searched) {
    const M none = scale == vec(0.0f);
    for (int i = 0; i < 16; i++) {
        const F l = rounded(x[i] / scale, vec(MAGIC - nmax), vec(MAGIC + nmax - 1));
        level[i] = trunc(l) + vec(nmax);
    }
    if (any(none)) {
        for (int i = 0; i < 16; i++) level[i] = select(none, trunc(searched(i)), level[i]);
    }
    return ~(none | roundable(largest / scale));
}

// ggml's search without column weights (make_q3_quants): each weight in turn takes its best level given the others.
INLINE M take_turns(const F *x, F *level, F &found) {
    constexpr int nmax = 4;
    const F low = vec(MAGIC - nmax), high = vec(MAGIC + nmax - 1);
    F max, lx = vec(0.0f), l2 = vec(0.0f);
    const M empty = largest_first(x, 16, max) < vec(TINY);
    const F iscale = vec(static_cast<float>(-nmax)) / max;
    for (int i = 0; i < 16; i++) {
        level[i] = rounded(iscale * x[i], low, high);
        const F w = x[i] * x[i];
        lx = lx + w * x[i] * level[i];
        l2 = l2 + w * level[i] * level[i];
    }
    M odd = no_lane();
    for (int round = 0; round < 5; round++) {
        M changed = no_lane();
        for (int i = 0; i < 16; i++) {
            const F w = x[i] * x[i], l = level[i];
            const F slx = lx - w * x[i] * l, sl2 = l2 - w * l * l, wanted = x[i] * sl2 / slx;
            const M able = (slx > vec(0.0f)) & ~empty;
            odd = odd | (able & ~roundable(wanted));
            const F other = rounded(wanted, low, high);
            const F olx = slx + w * x[i] * other, ol2 = sl2 + w * other * other;
            const M better = able & ~(other == l) & (ol2 > vec(0.0f)) & (olx * olx * l2 > lx * lx * ol2);
            level[i] = select(better, other, l);
            lx = select(better, olx, lx);
            l2 = select(better, ol2, l2);
            changed = changed | better;
        }
        if (!any(changed)) break;
    }
    for (int i = 0; i < 16; i++) level[i] = select(empty, vec(0.0f), level[i] + vec(static_cast<float>(nmax)));
    found = select(empty | ~(l2 > vec(0.0f)), vec(0.0f), lx / l2);
    return odd;
}

INLINE M q3_k(const Group &g) {
    F x[256], scale[16], d, stored[16];   // stored: the scales' levels, from 0
    Symmetric fit[16];
    F turned[256];
    const F sum = vec(2.0f) * load_squares(g.x, 0, 256, x);
    M odd = ~finite(sum);
    if (g.weighted) {
        F w[16], sw[16];
        for (int j = 0; j < 16; j++) {
            weigh(g, 16 * j, sum * vec(1.0f / 256), x + 16 * j, w);
            sw[j] = vec(0.0f);
            for (int i = 0; i < 16; i++) sw[j] = sw[j] + w[i];
            fit[j] = symmetric_search<16, 4>(x + 16 * j, w);
            scale[j] = fit[j].scale;
            odd = odd | ~finite(scale[j]);
        }
        const Symmetric s = symmetric_search<16, 32>(scale, sw);
        d = s.scale;
        for (int j = 0; j < 16; j++) stored[j] = symmetric_level<32>(s, scale[j]);
    } else {
        F max;
        for (int j = 0; j < 16; j++) {
            odd = odd | take_turns(x + 16 * j, turned + 16 * j, scale[j]);
            fit[j].largest = largest_first(x + 16 * j, 16, max);
        }
        largest_first(scale, 16, max);
        const M none = max == vec(0.0f);
        const F iscale = vec(-32.0f) / max;
        d = select(none, vec(0.0f), vec(1.0f) / iscale);
        odd = odd | ~(none | roundable(iscale * max));
        for (int j = 0; j < 16; j++) {
            const F l = rounded(iscale * scale[j], vec(MAGIC - 32), vec(MAGIC + 31)) + vec(32.0f);
            stored[j] = select(none, vec(0.0f), l);
        }
    }
    odd = odd | ~finite(d);
    const I half = to_half(d);
    I level[256], bytes[64];
    for (int j = 0; j < 16; j++) {
        const F *xj = x + 16 * j, block = from_half(half) * (stored[j] - vec(32.0f));
        odd = odd | levels<4>(xj, fit[j].largest, block, level + 16 * j, [&](int i) {
            return g.weighted ? symmetric_level<4>(fit[j], xj[i]) : turned[16 * j + i];
        });
    }

    for (int k = 0; k < 32; k++) {
        const I *l = level + k;   // the highest of the three bits: that of weight 32 * b + k is bit b
        bytes[k] = shr<2>(l[0]) | shl<1>(shr<2>(l[32])) | shl<2>(shr<2>(l[64])) | shl<3>(shr<2>(l[96])) |
                   shl<4>(shr<2>(l[128])) | shl<5>(shr<2>(l[160])) | shl<6>(shr<2>(l[192])) | shl<7>(shr<2>(l[224]));
    }
    store_bytes(bytes, 32, g.out, 0);
    for (int k = 0; k < 256; k++) level[k] = level[k] & vec(3);
    for (int k = 0; k < 64; k++) {
        const I *l = level + k / 32 * 128 + k % 32;
        bytes[k] = l[0] | shl<2>(l[32]) | shl<4>(l[64]) | shl<6>(l[96]);
    }
    store_bytes(bytes, 64, g.out, 32);
    I s[16];
    for (int j = 0; j < 16; j++) s[j] = trunc(stored[j]);
    for (int j = 0; j < 8; j++) bytes[j] = (s[j] & vec(15)) | shl<4>(s[j + 8] & vec(15));
    for (int j = 0; j < 4; j++) {
        bytes[8 + j] = shr<4>(s[j]) | shl<2>(shr<4>(s[j + 4])) | shl<4>(shr<4>(s[j + 8])) | shl<6>(shr<4>(s[j + 12]));
    }
    store_bytes(bytes, 12, g.out, 96);
    store_half(half, g.out, 108);
    return odd;
}

INLINE M q6_k(const Group &g) {
    F x[256], w[16], scale[16];
    Symmetric fit[16];
    M odd = ~finite(load_squares(g.x, 0, 256, x));
    for (int j = 0; j < 16; j++) {
        if (g.weighted) load_lanes(g.w, 16 * j, 16, w);
        else weigh(g, 16 * j, vec(0.0f), x + 16 * j, w);
        fit[j] = symmetric_search<16, 32>(x + 16 * j, w);
        scale[j] = fit[j].scale;
        odd = odd | ~finite(scale[j]);
    }
    F max;
    const M empty = largest_first(scale, 16, max) < vec(TINY);
    const F iscale = vec(-128.0f) / max, d = vec(1.0f) / iscale;
    const I half = select(empty, vec(0), to_half(d));
    odd = odd | ~(empty | finite(d));
    I level[256], bytes[128];
    for (int j = 0; j < 16; j++) {
        const F stored = rounded(iscale * scale[j], vec(MAGIC - 128), vec(MAGIC + 127));
        const F *xj = x + 16 * j, block = from_half(half) * stored;
        const M wrong = levels<32>(xj, fit[j].largest, block, level + 16 * j, [&](int i) { return symmetric_level<32>(fit[j], xj[i]); });
        odd = odd | (wrong & ~empty);
        bytes[j] = select(empty, vec(0), trunc(stored) & vec(255));
    }
    store_bytes(bytes, 16, g.out, 192);
    for (int k = 0; k < 256; k++) level[k] = select(empty, vec(0), level[k]);
    for (int k = 0; k < 128; k++) {
        const I *l = level + k / 64 * 128 + k % 64;
        bytes[k] = (l[0] & vec(15)) | shl<4>(l[64] & vec(15));
    }
    store_bytes(bytes, 128, g.out, 0);
    for (int k = 0; k < 64; k++) {
        const I *l = level + k / 32 * 128 + k % 32;
        bytes[k] = shr<4>(l[0]) | shl<2>(shr<4>(l[32])) | shl<4>(shr<4>(l[64])) | shl<6>(shr<4>(l[96]));
    }
    store_bytes(bytes, 64, g.out, 128);
    store_half(half, g.out, 208);
    return odd;
}

}  // namespace

KERNEL(q3_k) { run<11, 256, 110>(call, q3_k); }
KERNEL(q6_k) { run<14, 256, 210>(call, q6_k); }
