// AVX2 and FMA.
#include <cmath>
#include "linear.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace avx2 {

using V = __m256;
constexpr int LANES = 8;
static inline V zero() { return _mm256_setzero_ps(); }
static inline V spread(float x) { return _mm256_set1_ps(x); }
static inline V multiply_add(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline void store(float* to, V x) { _mm256_storeu_ps(to, x); }
static inline void prefetch(const char* at) { _mm_prefetch(at, _MM_HINT_T0); }
static inline __m256i load(const bf16* pairs) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs)); }
static inline V low(const bf16* pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(load(pairs), 16)); }
static inline V high(const bf16* pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(load(pairs), _mm256_set1_epi32(int(0xffff0000))));
}

#include "float_tile.h"

// Six rows and two vectors of columns are 12 sums; with two vectors of weights, a number and a mask no register is left.
// By hand, because compilers want both numbers of a pair at once, and then have their sums in memory. `line`: bytes from
// a pair's columns to those of the next.
#define ADD(at, first, second)                              \
    "vbroadcastss " at ", %%ymm15\n\t"                      \
    "vfmadd231ps %%ymm13, %%ymm15, %%ymm" #first "\n\t"     \
    "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #second "\n\t"
#define SIX_ROWS(at)                                                                                     \
    ADD(at "(%[a])", 0, 1) ADD(at "(%[a],%[k],4)", 2, 3) ADD(at "(%[a],%[k],8)", 4, 5)                    \
    ADD(at "(%[b])", 6, 7) ADD(at "(%[b],%[k],4)", 8, 9) ADD(at "(%[b],%[k],8)", 10, 11)
#define ZERO(n) "vxorps %%ymm" #n ", %%ymm" #n ", %%ymm" #n "\n\t"
#define STORE(row, first, second)                           \
    "vmovups %%ymm" #first ", " #row "*128(%[c])\n\t"       \
    "vmovups %%ymm" #second ", " #row "*128+32(%[c])\n\t"

static void six_rows(const float* a, const bf16* w, int64_t k, int64_t line, float* c) {
    static_assert(BLOCK * sizeof(float) == 128, "from one row of c to the next");
    const float *b = a + 3 * k, *end = a + k;
    asm volatile(
        "vpcmpeqd %%ymm12, %%ymm12, %%ymm12\n\t"
        "vpslld $16, %%ymm12, %%ymm12\n\t"
        ZERO(0) ZERO(1) ZERO(2) ZERO(3) ZERO(4) ZERO(5) ZERO(6) ZERO(7) ZERO(8) ZERO(9) ZERO(10) ZERO(11)
        ".p2align 5\n"
        "1:\n\t"
        "vmovdqu (%[w]), %%ymm13\n\t"
        "vmovdqu 32(%[w]), %%ymm14\n\t"
        "prefetcht1 (%[w],%[soon])\n\t"
        "vpslld $16, %%ymm13, %%ymm13\n\t"
        "vpslld $16, %%ymm14, %%ymm14\n\t"
        SIX_ROWS("")
        "vpand (%[w]), %%ymm12, %%ymm13\n\t"
        "vpand 32(%[w]), %%ymm12, %%ymm14\n\t"
        SIX_ROWS("4")
        "add $8, %[a]\n\t"
        "add $8, %[b]\n\t"
        "add %[line], %[w]\n\t"
        "cmp %[end], %[a]\n\t"
        "jb 1b\n\t"
        STORE(0, 0, 1) STORE(1, 2, 3) STORE(2, 4, 5) STORE(3, 6, 7) STORE(4, 8, 9) STORE(5, 10, 11)
        "vzeroupper\n\t"  // compilers do not know that upper halves are in use here
        : [a] "+&r"(a), [b] "+&r"(b), [w] "+&r"(w)
        : [k] "r"(k), [line] "r"(line), [end] "r"(end), [c] "r"(c), [soon] "r"(line * k / 2)
        : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
          "xmm13", "xmm14", "xmm15", "cc", "memory");
}

template <int WIDTH>
static int64_t many_rows(const float* a, const bf16* w, int64_t k, int64_t rows, float* c) {
    constexpr int64_t VECTOR = LANES * 2;  // numbers of a vector of pairs
    int64_t i = 0;
    for (; i + 6 <= rows; i += 6)
        for (int v = 0; v < WIDTH; v += 2) six_rows(a + i * k, w + v * VECTOR, k, WIDTH * VECTOR * 2, c + i * BLOCK + v * LANES);
    for (; i + 4 <= rows; i += 4)
        for (int v = 0; v < WIDTH; v += 2) sum_rows<4, 2, WIDTH>(a + i * k, w + v * VECTOR, k, c + i * BLOCK + v * LANES);
    return i;
}

#include "ops.h"

}  // namespace avx2

const Ops avx2_ops = OPS_OF(avx2);

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
