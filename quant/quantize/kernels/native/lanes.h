// Lanes: the vector type of all kernels, W floats or integers wide.
//
// A kernel is the scalar program of its format with each variable made a vector: lane l works on superblock l, and no
// lane depends on another. So every sum runs in ggml's order, and the bytes are ggml's by construction. Vectorizing
// within a superblock would add in another order, and change bytes. One source is compiled for every instruction set;
// this header chooses the implementation of its operations.
//
//   W                                       lanes: 16 (AVX-512), 8 (AVX2), 4 (NEON)
//   F, I, M                                 floats, 32-bit integers, and a mask (the answer to a comparison)
//   vec(1.5f), vec(3)                       the same number in every lane
//   load, store / loadu, storeu             at 4*W bytes' alignment / at any
//   + - * /  sqrt  abs  -a                  IEEE, rounded to nearest; never fused, never estimated
//   nearest(a)                              the nearest integer, ties to even; -0 for what is just below 0
//   min_(a, b), max_(a, b)                  exactly `a < b ? a : b` and `a > b ? a : b`, for NaN and -0 too; F and I
//   < <= > >= ==                            masks; false where a side is NaN. I has < > ==
//   select(m, a, b)                         m ? a : b
//   & | ~ on M; any(m), all(m), bits(m)     bit l of bits(m) is lane l
//   + - & | ^ on I; shl<n> shr<n> sar<n>    shr shifts in zeros, sar the sign
//   float_of(I), trunc(F)                   conversions as C's casts; trunc only where the value fits an int
//   bits_of(F), from_bits(I)                the same 32 bits read as the other type
//   to_half(F), from_half(I)                GGML_FP32_TO_FP16 and back, the half in the low 16 bits. Equal to ggml's
//                                           for every number; not for NaN, so a lane with NaN is an odd lane
//   lookup16(table, i)                      table[i] for i in 0 … 15, F or I from 16 aligned floats or ints
//   transpose(v)                            v[W] in place: lane l of v[i] becomes lane i of v[l]
//
// Odd lanes. A kernel need not reproduce what ggml does with infinities, denormals or numbers outside of rounding range.
// It returns a mask of the lanes that met such a number, and the driver (kernel.h) lets ggml write those blocks. So
// detect cheaply that a lane is odd; what is computed in it does not matter.
//
// Everything is in an anonymous namespace: objects of different instruction sets are linked into one library, and the
// linker must not merge an inline function of one with that of another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(QUANT_AVX512)
#include "lanes_avx512.h"
#elif defined(QUANT_AVX2)
#include "lanes_avx2.h"
#elif defined(QUANT_NEON)
#include "lanes_neon.h"
#else
#error "no instruction set is named; see CMakeLists.txt"
#endif

namespace {

#define INLINE static inline __attribute__((always_inline))

// 1.5 * 2^23: adding it rounds to the nearest integer, ties to even, and leaves that integer in the low bits.
constexpr float MAGIC = 12582912.0f;
// ggml's rounding is a plain nearest_int up to here.
constexpr float ROUNDABLE = 4194303.0f;

// ggml's nearest_int, bit for bit, also where it overflows.
INLINE I nearest_int(F v) { return (bits_of(v + vec(MAGIC)) & vec(0x007fffff)) - vec(0x00400000); }

// Whether nearest_int(v) is the nearest integer: v is neither NaN nor too large. Rounding is monotone, so testing the
// extreme values is enough.
INLINE M roundable(F v) { return abs(v) <= vec(ROUNDABLE); }

// nearest_int clamped to lo … hi, as a float, for a `v` that is roundable. `low` is MAGIC + lo, `high` MAGIC + hi.
INLINE F rounded(F v, F low, F high) {
    return min_(max_(v + vec(MAGIC), low), high) - vec(MAGIC);
}

INLINE M finite(F v) { return abs(v) < vec(INFINITY); }

// Loads W floats from each of W addresses, so that lane l of to[i] is from[l][i].
INLINE void load_transposed(const float *const *from, int64_t offset, F *to) {
    for (int l = 0; l < W; l++) to[l] = loadu(from[l] + offset);
    transpose(to);
}

// Loads `n` elements (a multiple of 16) of W blocks, one per lane.
INLINE void load_lanes(const float *const *from, int64_t offset, int n, F *to) {
    for (int i = 0; i < n; i += W) load_transposed(from, offset + i, to + i);
}

// The same; returns the sum of their squares, added in their order.
INLINE F load_squares(const float *const *from, int64_t offset, int n, F *to) {
    F sum = vec(0.0f);
    for (int i = 0; i < n; i += W) {
        load_transposed(from, offset + i, to + i);
        for (int k = i; k < i + W; k++) sum = sum + to[k] * to[k];
    }
    return sum;
}

// Four vectors of bytes as one vector of little-endian words.
INLINE I word(I a, I b, I c, I d) { return a | shl<8>(b) | shl<16>(c) | shl<24>(d); }

// Stores `n` words of every lane: word k of lane l goes to to[l] + offset + 4 * k.
INLINE void store_words(const I *words, int n, uint8_t *const *to, int offset) {
    alignas(64) int32_t lanes[W];
    for (int k = 0; k < n; k++) {
        store(lanes, words[k]);
        for (int l = 0; l < W; l++) std::memcpy(to[l] + offset + 4 * k, &lanes[l], 4);
    }
}

// Stores `n` bytes of every lane (a multiple of 4), each in a vector of its own.
INLINE void store_bytes(const I *bytes, int n, uint8_t *const *to, int offset) {
    for (int k = 0; k < n; k += 4) {
        const I w = word(bytes[k], bytes[k + 1], bytes[k + 2], bytes[k + 3]);
        store_words(&w, 1, to, offset + k);
    }
}

// Stores the low 16 bits of every lane.
INLINE void store_half(I half, uint8_t *const *to, int offset) {
    alignas(64) int32_t lanes[W];
    store(lanes, half);
    for (int l = 0; l < W; l++) std::memcpy(to[l] + offset, &lanes[l], 2);
}

}  // namespace
