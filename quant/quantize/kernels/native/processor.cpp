// Queries of the processor and of the thread; compiled for any processor of the architecture.
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

// The instruction sets that processor and operating system support, as bits: 1 AVX2 with F16C, 2 AVX-512, 4 NEON.
EXPORT int quant_processor() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return (avx2 ? 1 : 0) | (avx512 ? 2 : 0);
#elif defined(__aarch64__)
    return 4;
#else
    return 0;
#endif
}

// Whether the calling thread flushes denormals to zero, reads them as zero, or does not round to nearest.
EXPORT int quant_floats_are_odd() {
#if defined(__x86_64__)
    return (_mm_getcsr() & 0xe040) != 0;
#elif defined(__aarch64__)
    uint64_t state;
    __asm__ volatile("mrs %0, fpcr" : "=r"(state));
    return (state & 0x01c00000) != 0;
#else
    return 0;
#endif
}
