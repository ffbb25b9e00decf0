// AVX-512 with bf16: VDPBF16PS adds the products of 16 pairs to 16 float32 sums.
#include <cmath>
#include "linear.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif

namespace avx512_bf16 {

using Number = bf16;
static inline Number number(bf16 x) { return x; }

#include "row_major.h"

template <int ROWS, int VECTORS>
static void dot_rows(const bf16* a, const bf16* w, int64_t k, float* c) {
    __m512 sums[ROWS][VECTORS];
    for (auto& row : sums)
        for (auto& sum : row) sum = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < k / 2; ++pair, w += VECTORS * 32) {
        __m512bh pairs[VECTORS];
        for (int v = 0; v < VECTORS; ++v) pairs[v] = (__m512bh)_mm512_loadu_si512(w + v * 32);
        for (int i = 0; i < ROWS; ++i) {
            int32_t two;
            memcpy(&two, a + i * k + 2 * pair, 4);
            for (int v = 0; v < VECTORS; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], (__m512bh)_mm512_set1_epi32(two), pairs[v]);
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(c + i * BLOCK + v * 16, sums[i][v]);
}

template <int VECTORS>
static void columns_of(const bf16* a, const bf16* w, int64_t k, int64_t rows, float* c) {
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8) dot_rows<8, VECTORS>(a + i * k, w, k, c + i * BLOCK);
    for (; i + 4 <= rows; i += 4) dot_rows<4, VECTORS>(a + i * k, w, k, c + i * BLOCK);
    for (; i < rows; ++i) dot_rows<1, VECTORS>(a + i * k, w, k, c + i * BLOCK);
}

static void tile(const bf16* a, const bf16* w, int64_t k, int64_t rows, int64_t columns, float* c) {
    columns == BLOCK ? columns_of<2>(a, w, k, rows, c) : columns_of<1>(a, w, k, rows, c);
}

#include "ops.h"

}  // namespace avx512_bf16

const Ops avx512_bf16_ops = OPS_OF(avx512_bf16);

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
