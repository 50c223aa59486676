// Runs one kernel over cases from standard input and says how many blocks are not as expected. For instruction sets that
// this machine does not have (under an emulator) and for builds that watch every access to memory: each array has its own
// allocation, of just its size.
//
//   replay NAME TYPE_ID BLOCK BYTES < cases
//
// A case: int64 rows, row, weighted; the rows; the weights of the columns, if there are any; the stored rows expected.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

using Chunk = size_t (*)(int, const float *, void *, int64_t, int64_t, int64_t, const float *);
struct Counts { int64_t odd, faulty, refused; };
using Kernel = void (*)(const float *, void *, int64_t, int64_t, const float *, Chunk, Counts *);

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define K(name) extern "C" void JOIN(QUANT_ISA, name)(const float *, void *, int64_t, int64_t, const float *, Chunk, Counts *);
KERNELS
#undef K
#define K(name) {#name, JOIN(QUANT_ISA, name)},
static const struct { const char *name; Kernel kernel; } ALL[] = {KERNELS};

static int64_t block, bytes;
static const uint8_t *expected;
static uint8_t *out;

// What ggml would write there is known.
static size_t chunk(int, const float *, void *to, int64_t, int64_t rows, int64_t row, const float *) {
    const size_t n = rows * row / block * bytes;
    std::memcpy(to, expected + (static_cast<uint8_t *>(to) - out), n);
    return n;
}

template <class T> static std::unique_ptr<T[]> read(int64_t n) {
    std::unique_ptr<T[]> a(new T[n]);
    if (std::fread(a.get(), sizeof(T), n, stdin) != static_cast<size_t>(n)) std::exit(2);
    return a;
}

int main(int, char **argv) {
    Kernel kernel = nullptr;
    for (const auto &k : ALL) {
        if (!std::strcmp(k.name, argv[1])) kernel = k.kernel;
    }
    block = std::atoll(argv[3]);
    bytes = std::atoll(argv[4]);
    int64_t head[3], wrong = 0, all = 0;
    Counts counts = {0, 0, 0};
    while (std::fread(head, sizeof head, 1, stdin) == 1) {
        const int64_t n = head[0] * head[1], blocks = n / block;
        const auto x = read<float>(n), w = read<float>(head[2] ? head[1] : 0);
        const auto e = read<uint8_t>(blocks * bytes);
        const std::unique_ptr<uint8_t[]> o(new uint8_t[blocks * bytes]);
        expected = e.get();
        out = o.get();
        kernel(x.get(), out, head[0], head[1], head[2] ? w.get() : nullptr, chunk, &counts);
        for (int64_t b = 0; b < blocks; b++) wrong += std::memcmp(out + b * bytes, expected + b * bytes, bytes) != 0;
        all += blocks;
    }
    std::printf("%lld blocks, %lld wrong, %lld odd\n", (long long)all, (long long)wrong, (long long)counts.odd);
    return wrong != 0;
}
