// AVX-512 without bf16.
#include <cmath>
#include "linear.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif

namespace avx512 {

using V = __m512;
constexpr int LANES = 16;
static inline V zero() { return _mm512_setzero_ps(); }
static inline V multiply_add(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline void store(float* to, V x) { _mm512_storeu_ps(to, x); }
static inline void prefetch(const char* at) { _mm_prefetch(at, _MM_HINT_T0); }
static inline V spread(float x) { return _mm512_set1_ps(x); }
static inline V low(const bf16* pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(pairs), 16)); }
static inline V high(const bf16* pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(pairs), _mm512_set1_epi32(int(0xffff0000))));
}

#include "float_tile.h"

template <int WIDTH>
static int64_t many_rows(const float* a, const bf16* w, int64_t k, int64_t rows, float* c) {
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8) sum_rows<8, WIDTH, WIDTH>(a + i * k, w, k, c + i * BLOCK);
    for (; i + 4 <= rows; i += 4) sum_rows<4, WIDTH, WIDTH>(a + i * k, w, k, c + i * BLOCK);
    return i;
}

#include "ops.h"

}  // namespace avx512

const Ops avx512_ops = OPS_OF(avx512);

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
