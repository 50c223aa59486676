// The operations of lanes.h in AVX2 with F16C: 8 lanes. A mask is a vector of all ones or all zeros.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int W = 8;

struct F { __m256 v; };
struct I { __m256i v; };
struct M { __m256 v; };

#define OP static inline __attribute__((always_inline))

OP F vec(float a) { return {_mm256_set1_ps(a)}; }
OP I vec(int32_t a) { return {_mm256_set1_epi32(a)}; }
OP F load(const float *p) { return {_mm256_load_ps(p)}; }
OP I load(const int32_t *p) { return {_mm256_load_si256(reinterpret_cast<const __m256i *>(p))}; }
OP F loadu(const float *p) { return {_mm256_loadu_ps(p)}; }
OP I loadu(const int32_t *p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))}; }
OP void store(float *p, F a) { _mm256_store_ps(p, a.v); }
OP void store(int32_t *p, I a) { _mm256_store_si256(reinterpret_cast<__m256i *>(p), a.v); }
OP void storeu(float *p, F a) { _mm256_storeu_ps(p, a.v); }
OP void storeu(int32_t *p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a.v); }

OP I bits_of(F a) { return {_mm256_castps_si256(a.v)}; }
OP F from_bits(I a) { return {_mm256_castsi256_ps(a.v)}; }
OP F float_of(I a) { return {_mm256_cvtepi32_ps(a.v)}; }
OP I trunc(F a) { return {_mm256_cvttps_epi32(a.v)}; }
OP I to_half(F a) {
    return {_mm256_cvtepu16_epi32(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
OP F from_half(I a) {
    const __m256i low = _mm256_and_si256(a.v, _mm256_set1_epi32(0xffff));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(packed))};
}

OP F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
OP F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
OP F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
OP F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
OP F operator-(F a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
OP F sqrt(F a) { return {_mm256_sqrt_ps(a.v)}; }
OP F abs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
OP F nearest(F a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
OP F min_(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
OP F max_(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }

OP I operator+(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
OP I operator-(I a, I b) { return {_mm256_sub_epi32(a.v, b.v)}; }
OP I operator&(I a, I b) { return {_mm256_and_si256(a.v, b.v)}; }
OP I operator|(I a, I b) { return {_mm256_or_si256(a.v, b.v)}; }
OP I operator^(I a, I b) { return {_mm256_xor_si256(a.v, b.v)}; }
OP I min_(I a, I b) { return {_mm256_min_epi32(a.v, b.v)}; }
OP I max_(I a, I b) { return {_mm256_max_epi32(a.v, b.v)}; }
template <int n> OP I shl(I a) { return {_mm256_slli_epi32(a.v, n)}; }
template <int n> OP I shr(I a) { return {_mm256_srli_epi32(a.v, n)}; }
template <int n> OP I sar(I a) { return {_mm256_srai_epi32(a.v, n)}; }

OP M operator<(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
OP M operator<=(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
OP M operator>(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
OP M operator>=(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
OP M operator==(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
OP M operator<(I a, I b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v))}; }
OP M operator>(I a, I b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.v, b.v))}; }
OP M operator==(I a, I b) { return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))}; }
OP M operator&(M a, M b) { return {_mm256_and_ps(a.v, b.v)}; }
OP M operator|(M a, M b) { return {_mm256_or_ps(a.v, b.v)}; }
OP M operator~(M a) { return {_mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
OP unsigned bits(M a) { return static_cast<unsigned>(_mm256_movemask_ps(a.v)); }
OP bool any(M a) { return bits(a) != 0; }
OP bool all(M a) { return bits(a) == 0xff; }
OP M no_lane() { return {_mm256_setzero_ps()}; }
OP F select(M m, F a, F b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
OP I select(M m, I a, I b) {
    return {_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(b.v), _mm256_castsi256_ps(a.v), m.v))};
}

OP F lookup16(const float *table, I i) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), i.v);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), i.v);
    return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i.v, 28)))};
}
OP I lookup16(const int32_t *table, I i) { return bits_of(lookup16(reinterpret_cast<const float *>(table), i)); }

OP void transpose(F *v) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(v[i].v, v[i + 1].v);
        a[i + 1] = _mm256_unpackhi_ps(v[i].v, v[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int k = 0; k < 2; k++) {
            b[i + 2 * k] = _mm256_shuffle_ps(a[i + k], a[i + k + 2], 0x44);
            b[i + 2 * k + 1] = _mm256_shuffle_ps(a[i + k], a[i + k + 2], 0xee);
        }
    }
    for (int c = 0; c < 4; c++) {
        v[c].v = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
        v[4 + c].v = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
    }
}

#undef OP

}  // namespace
