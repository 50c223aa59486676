// The operations of lanes.h in AArch64's NEON: 4 lanes. Never vfma, vmla or an estimate: they round differently.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace {

constexpr int W = 4;

struct F { float32x4_t v; };
struct I { int32x4_t v; };
struct M { uint32x4_t v; };

#define OP static inline __attribute__((always_inline))

OP F vec(float a) { return {vdupq_n_f32(a)}; }
OP I vec(int32_t a) { return {vdupq_n_s32(a)}; }
OP F load(const float *p) { return {vld1q_f32(p)}; }
OP I load(const int32_t *p) { return {vld1q_s32(p)}; }
OP F loadu(const float *p) { return {vld1q_f32(p)}; }
OP I loadu(const int32_t *p) { return {vld1q_s32(p)}; }
OP void store(float *p, F a) { vst1q_f32(p, a.v); }
OP void store(int32_t *p, I a) { vst1q_s32(p, a.v); }
OP void storeu(float *p, F a) { vst1q_f32(p, a.v); }
OP void storeu(int32_t *p, I a) { vst1q_s32(p, a.v); }

OP I bits_of(F a) { return {vreinterpretq_s32_f32(a.v)}; }
OP F from_bits(I a) { return {vreinterpretq_f32_s32(a.v)}; }
OP F float_of(I a) { return {vcvtq_f32_s32(a.v)}; }
OP I trunc(F a) { return {vcvtq_s32_f32(a.v)}; }
OP I to_half(F a) {
    return {vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32(a.v))))};
}
OP F from_half(I a) { return {vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(vreinterpretq_u32_s32(a.v))))}; }

OP F operator+(F a, F b) { return {vaddq_f32(a.v, b.v)}; }
OP F operator-(F a, F b) { return {vsubq_f32(a.v, b.v)}; }
OP F operator*(F a, F b) { return {vmulq_f32(a.v, b.v)}; }
OP F operator/(F a, F b) { return {vdivq_f32(a.v, b.v)}; }
OP F operator-(F a) { return {vnegq_f32(a.v)}; }
OP F sqrt(F a) { return {vsqrtq_f32(a.v)}; }
OP F nearest(F a) { return {vrndnq_f32(a.v)}; }
OP F abs(F a) { return {vabsq_f32(a.v)}; }
// vminq_f32 treats NaN and -0 differently from C.
OP F min_(F a, F b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
OP F max_(F a, F b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }

OP I operator+(I a, I b) { return {vaddq_s32(a.v, b.v)}; }
OP I operator-(I a, I b) { return {vsubq_s32(a.v, b.v)}; }
OP I operator&(I a, I b) { return {vandq_s32(a.v, b.v)}; }
OP I operator|(I a, I b) { return {vorrq_s32(a.v, b.v)}; }
OP I operator^(I a, I b) { return {veorq_s32(a.v, b.v)}; }
OP I min_(I a, I b) { return {vminq_s32(a.v, b.v)}; }
OP I max_(I a, I b) { return {vmaxq_s32(a.v, b.v)}; }
template <int n> OP I shl(I a) { return {vshlq_n_s32(a.v, n)}; }
template <int n> OP I shr(I a) { return {vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v), n))}; }
template <int n> OP I sar(I a) { return {vshrq_n_s32(a.v, n)}; }

OP M operator<(F a, F b) { return {vcltq_f32(a.v, b.v)}; }
OP M operator<=(F a, F b) { return {vcleq_f32(a.v, b.v)}; }
OP M operator>(F a, F b) { return {vcgtq_f32(a.v, b.v)}; }
OP M operator>=(F a, F b) { return {vcgeq_f32(a.v, b.v)}; }
OP M operator==(F a, F b) { return {vceqq_f32(a.v, b.v)}; }
OP M operator<(I a, I b) { return {vcltq_s32(a.v, b.v)}; }
OP M operator>(I a, I b) { return {vcgtq_s32(a.v, b.v)}; }
OP M operator==(I a, I b) { return {vceqq_s32(a.v, b.v)}; }
OP M operator&(M a, M b) { return {vandq_u32(a.v, b.v)}; }
OP M operator|(M a, M b) { return {vorrq_u32(a.v, b.v)}; }
OP M operator~(M a) { return {vmvnq_u32(a.v)}; }
OP unsigned bits(M a) {
    const uint32x4_t place = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(a.v, place));
}
OP bool any(M a) { return vmaxvq_u32(a.v) != 0; }
OP bool all(M a) { return vminvq_u32(a.v) != 0; }
OP M no_lane() { return {vdupq_n_u32(0)}; }
OP F select(M m, F a, F b) { return {vbslq_f32(m.v, a.v, b.v)}; }
OP I select(M m, I a, I b) { return {vbslq_s32(m.v, a.v, b.v)}; }

OP F lookup16(const float *table, I i) {
    const float32x4_t found = {table[i.v[0]], table[i.v[1]], table[i.v[2]], table[i.v[3]]};
    return {found};
}
OP I lookup16(const int32_t *table, I i) {
    const int32x4_t found = {table[i.v[0]], table[i.v[1]], table[i.v[2]], table[i.v[3]]};
    return {found};
}

OP void transpose(F *v) {
    const float32x4x2_t a = vtrnq_f32(v[0].v, v[1].v), b = vtrnq_f32(v[2].v, v[3].v);
    v[0].v = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    v[1].v = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    v[2].v = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    v[3].v = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

#undef OP

}  // namespace
