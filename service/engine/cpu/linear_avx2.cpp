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
static inline __m256i load(const bf16* pairs) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs)); }
static inline V low(const bf16* pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(load(pairs), 16)); }
static inline V high(const bf16* pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(load(pairs), _mm256_set1_epi32(int(0xffff0000))));
}

#include "row_major.h"
#include "float_tile.h"
#include "ops.h"

}  // namespace avx2

const Ops avx2_ops = OPS_OF(avx2);

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
