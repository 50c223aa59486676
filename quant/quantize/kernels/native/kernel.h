// The arguments of a kernel, and the loop that all kernels share.
//
// A family file (iq4.cpp, kquants.cpp, …) defines, for each of its types, one function that works on a group of W
// superblocks, and exports it:
//
//   M iq4_nl(const Group &g);                      // writes g.out[l] for each lane l; returns the odd lanes
//   KERNEL(iq4_nl) { run<20, 32, 18>(call, iq4_nl); }
//
// It is compiled once for every instruction set and exported as `avx512_iq4_nl`, `avx2_iq4_nl`, … The library's
// exported names are the table of what there is; quant/quantize/kernels looks them up, and CMake takes every *.cpp that lies
// here.
#pragma once

#include "lanes.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

// ggml_quantize_chunk: (type, rows, out, start, number of rows, row length, column weights or null). Its first call
// builds the type's tables, under a lock of its own.
using Chunk = size_t (*)(int, const float *, void *, int64_t, int64_t, int64_t, const float *);

struct Counts {
    int64_t odd;      // superblocks (rows, in types whose statistics span a row) that were left to ggml
    int64_t faulty;   // superblocks that met a fault of ggml, which the kernel reproduces
    int64_t refused;  // superblocks on which ggml would abort; zeros are written instead
};

struct Call {
    const float *rows;      // nrows * row floats
    uint8_t *out;           // nrows stored rows
    int64_t nrows, row;
    const float *weights;   // `row` floats, the same for every row, or null
    Chunk chunk;
    Counts *counts;
};

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

// The body of an exported kernel, which sees its `call`.
#define KERNEL(name)                                                                                                  \
    static void JOIN(name, body)(const Call &call);                                                                   \
    extern "C" __attribute__((visibility("default"))) void JOIN(QUANT_ISA, name)(                                      \
        const float *rows, void *out, int64_t nrows, int64_t row, const float *weights, Chunk chunk, Counts *counts) { \
        const PlainFloats plain;                                                                                       \
        JOIN(name, body)({rows, static_cast<uint8_t *>(out), nrows, row, weights, chunk, counts});                     \
    }                                                                                                                 \
    static void JOIN(name, body)(const Call &call)

namespace {

// Keeps denormals and rounds to nearest while it exists. A library built with -ffast-math may have switched the thread
// to flushing denormals, which changes bytes. ggml's own functions, called for odd lanes, run under it too.
class PlainFloats {
#if defined(__x86_64__)
    unsigned was = _mm_getcsr();

  public:
    PlainFloats() { _mm_setcsr(0x1f80); }
    ~PlainFloats() { _mm_setcsr(was); }
#elif defined(__aarch64__)
    uint64_t was;

  public:
    PlainFloats() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(was));
        __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
    }
    ~PlainFloats() { __asm__ volatile("msr fpcr, %0" : : "r"(was)); }
#endif
    PlainFloats(const PlainFloats &) = delete;
    PlainFloats &operator=(const PlainFloats &) = delete;
};

// W superblocks, one per lane. If fewer are left, the last one is repeated and written to a scratch buffer.
struct Group {
    const float *x[W];
    const float *w[W];   // the column weights (imatrix)
    bool weighted;       // whether there are any; otherwise w must not be read
    uint8_t *out[W];
    int lanes;           // how many are real
    Counts *counts;
};

// Quantizes all superblocks of a call, W at a time. `work` takes a Group and returns its odd lanes, which ggml then
// writes. `bytes` is the size of a stored block of `block` weights.
template <int type, int block, int bytes, class Work>
INLINE void run(const Call &call, Work work) {
    uint8_t nowhere[bytes];
    const int64_t per_row = call.row / block, blocks = call.nrows * per_row;
    Group group;
    group.weighted = call.weights != nullptr;
    group.counts = call.counts;
    for (int64_t first = 0; first < blocks; first += W) {
        group.lanes = blocks - first < W ? static_cast<int>(blocks - first) : W;
        for (int l = 0; l < W; l++) {
            const int64_t b = l < group.lanes ? first + l : blocks - 1;
            group.x[l] = call.rows + b * block;
            group.w[l] = group.weighted ? call.weights + b % per_row * block : nullptr;
            group.out[l] = l < group.lanes ? call.out + b * bytes : nowhere;
        }
        unsigned odd = bits(work(group)) & ((1u << group.lanes) - 1);
        for (; odd; odd &= odd - 1) {
            const int l = __builtin_ctz(odd);
            call.chunk(type, group.x[l], group.out[l], 0, 1, block, group.w[l]);
            call.counts->odd++;
        }
    }
}

}  // namespace
