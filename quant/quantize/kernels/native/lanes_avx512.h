// The operations of lanes.h in AVX-512 (F, BW, DQ, VL): 16 lanes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int W = 16;

struct F { __m512 v; };
struct I { __m512i v; };
struct M { __mmask16 v; };

#define OP static inline __attribute__((always_inline))

OP F vec(float a) { return {_mm512_set1_ps(a)}; }
OP I vec(int32_t a) { return {_mm512_set1_epi32(a)}; }
OP F load(const float *p) { return {_mm512_load_ps(p)}; }
OP I load(const int32_t *p) { return {_mm512_load_si512(p)}; }
OP F loadu(const float *p) { return {_mm512_loadu_ps(p)}; }
OP I loadu(const int32_t *p) { return {_mm512_loadu_si512(p)}; }
OP void store(float *p, F a) { _mm512_store_ps(p, a.v); }
OP void store(int32_t *p, I a) { _mm512_store_si512(p, a.v); }
OP void storeu(float *p, F a) { _mm512_storeu_ps(p, a.v); }
OP void storeu(int32_t *p, I a) { _mm512_storeu_si512(p, a.v); }

OP I bits_of(F a) { return {_mm512_castps_si512(a.v)}; }
OP F from_bits(I a) { return {_mm512_castsi512_ps(a.v)}; }
OP F float_of(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
OP I trunc(F a) { return {_mm512_cvttps_epi32(a.v)}; }
OP I to_half(F a) {
    return {_mm512_cvtepu16_epi32(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
OP F from_half(I a) { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(a.v))}; }

OP F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
OP F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
OP F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
OP F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
OP F operator-(F a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
OP F sqrt(F a) { return {_mm512_sqrt_ps(a.v)}; }
OP F abs(F a) { return {_mm512_abs_ps(a.v)}; }
OP F nearest(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
OP F min_(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
OP F max_(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }

OP I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
OP I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
OP I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
OP I operator|(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
OP I operator^(I a, I b) { return {_mm512_xor_si512(a.v, b.v)}; }
OP I min_(I a, I b) { return {_mm512_min_epi32(a.v, b.v)}; }
OP I max_(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int n> OP I shl(I a) { return {_mm512_slli_epi32(a.v, n)}; }
template <int n> OP I shr(I a) { return {_mm512_srli_epi32(a.v, n)}; }
template <int n> OP I sar(I a) { return {_mm512_srai_epi32(a.v, n)}; }

OP M operator<(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
OP M operator<=(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
OP M operator>(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
OP M operator>=(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
OP M operator==(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
OP M operator<(I a, I b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
OP M operator>(I a, I b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }
OP M operator==(I a, I b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
OP M operator&(M a, M b) { return {_kand_mask16(a.v, b.v)}; }
OP M operator|(M a, M b) { return {_kor_mask16(a.v, b.v)}; }
OP M operator~(M a) { return {_knot_mask16(a.v)}; }
OP unsigned bits(M a) { return a.v; }
OP bool any(M a) { return a.v != 0; }
OP bool all(M a) { return a.v == 0xffff; }
OP M no_lane() { return {0}; }
OP F select(M m, F a, F b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
OP I select(M m, I a, I b) { return {_mm512_mask_blend_epi32(m.v, b.v, a.v)}; }

OP F lookup16(const float *table, I i) { return {_mm512_permutexvar_ps(i.v, _mm512_load_ps(table))}; }
OP I lookup16(const int32_t *table, I i) { return {_mm512_permutexvar_epi32(i.v, _mm512_load_si512(table))}; }

OP void transpose(F *v) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(v[i].v, v[i + 1].v);
        a[i + 1] = _mm512_unpackhi_ps(v[i].v, v[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int k = 0; k < 2; k++) {
            const __m512d lo = _mm512_castps_pd(a[i + k]), hi = _mm512_castps_pd(a[i + k + 2]);
            b[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
            b[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
        }
    }
    // b[4 * r + c] holds column 4 * q + c of rows 4 * r … 4 * r + 3 in its quarter q.
    for (int c = 0; c < 4; c++) {
        const __m512 even01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), odd01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
        const __m512 even23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
        const __m512 odd23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
        v[c].v = _mm512_shuffle_f32x4(even01, even23, 0x88);
        v[8 + c].v = _mm512_shuffle_f32x4(even01, even23, 0xdd);
        v[4 + c].v = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
        v[12 + c].v = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
    }
}

#undef OP

}  // namespace
