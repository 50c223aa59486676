// Operations beside those of lanes.h, for kernels whose lanes are not superblocks and depend on each other.
//
//   mask_of(bits)           the inverse of bits(m)
//   following(a, b)         lane l of it is lane l + 1 of a, and the last one the first of b
//   pick(table, i)          lane l of it is lane i[l] % W of the table
//   spread4(p)              p[0] in four lanes, p[1] in the next four, and again from the ninth lane on; p[0] with 4 lanes
//   spread_eights(p)        p[0] in eight lanes, p[1] in the next eight
//   load_eights(p)          the same eight (or all W, if there are fewer) in every eight lanes, from an aligned place
//   least_of_eights(a)      the least of eight lanes in each of them; NaN nowhere
//   least_of_all(a)         the least of all lanes in each of them
#pragma once

#include "lanes.h"

namespace {

#if defined(QUANT_AVX512)

INLINE M mask_of(unsigned b) { return {static_cast<__mmask16>(b)}; }
INLINE I following(I a, I b) { return {_mm512_alignr_epi32(b.v, a.v, 1)}; }
INLINE F pick(F table, I i) { return {_mm512_permutexvar_ps(i.v, table.v)}; }
INLINE F two_spread(const float *p, __m512i each) {
    double both;   // never more than the two are read
    std::memcpy(&both, p, 8);
    return {_mm512_permutexvar_ps(each, _mm512_castpd_ps(_mm512_castpd128_pd512(_mm_set_sd(both))))};
}
INLINE F spread4(const float *p) {
    return two_spread(p, _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1));
}
INLINE F spread_eights(const float *p) {
    return two_spread(p, _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
}
INLINE I load_eights(const int32_t *p) {
    return {_mm512_broadcast_i32x8(_mm256_load_si256(reinterpret_cast<const __m256i *>(p)))};
}
INLINE F least_of_eights(F a) {
    F b = {_mm512_min_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0xb1))};
    b.v = _mm512_min_ps(b.v, _mm512_permute_ps(b.v, 0x4e));
    return {_mm512_min_ps(b.v, _mm512_permute_ps(b.v, 0xb1))};
}
INLINE F least_of_all(F a) {
    const F b = least_of_eights(a);
    return {_mm512_min_ps(b.v, _mm512_shuffle_f32x4(b.v, b.v, 0x4e))};
}

#elif defined(QUANT_AVX2)

INLINE M mask_of(unsigned b) {
    const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i here = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(b)), place);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(here, place))};
}
INLINE I following(I a, I b) {
    const __m256i round = _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 0);
    return {_mm256_permutevar8x32_epi32(_mm256_blend_epi32(a.v, b.v, 1), round)};
}
INLINE F pick(F table, I i) { return {_mm256_permutevar8x32_ps(table.v, i.v)}; }
INLINE F spread4(const float *p) { return {_mm256_set_m128(_mm_broadcast_ss(p + 1), _mm_broadcast_ss(p))}; }
INLINE F spread_eights(const float *p) { return vec(*p); }
INLINE I load_eights(const int32_t *p) { return load(p); }
INLINE F least_of_eights(F a) {
    F b = {_mm256_min_ps(a.v, _mm256_permute2f128_ps(a.v, a.v, 1))};
    b.v = _mm256_min_ps(b.v, _mm256_permute_ps(b.v, 0x4e));
    return {_mm256_min_ps(b.v, _mm256_permute_ps(b.v, 0xb1))};
}
INLINE F least_of_all(F a) { return least_of_eights(a); }

#elif defined(QUANT_NEON)

INLINE M mask_of(unsigned b) {
    const uint32x4_t place = {1, 2, 4, 8};
    return {vtstq_u32(vdupq_n_u32(b), place)};
}
INLINE I following(I a, I b) { return {vextq_s32(a.v, b.v, 1)}; }
INLINE F pick(F table, I i) {   // byte k of lane l is byte 4 * i[l] + k of the table
    const uint32x4_t low = vandq_u32(vreinterpretq_u32_s32(i.v), vdupq_n_u32(3));
    const uint8x16_t bytes = vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100), low, 0x04040404));
    return {vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(table.v), bytes))};
}
INLINE F spread4(const float *p) { return vec(*p); }
INLINE F spread_eights(const float *p) { return vec(*p); }
INLINE I load_eights(const int32_t *p) { return load(p); }
INLINE F least_of_eights(F a) { return {vdupq_n_f32(vminvq_f32(a.v))}; }
INLINE F least_of_all(F a) { return least_of_eights(a); }

#endif

INLINE float first_of(F v) {
    alignas(64) float lanes[W];
    store(lanes, v);
    return lanes[0];
}

INLINE float largest_of(F v) { return -first_of(least_of_all(-v)); }

}  // namespace
