// For instruction sets without bf16 dot products: numbers are widened to float32, which is exact, and multiplied there;
// those of the input when it is packed, because each meets all weights. Needs V (a vector of LANES floats) with zero(),
// spread(float), multiply_add(a, b, c), store(float*, V); low / high: the first and the second numbers of LANES pairs;
// and prefetch(address).
using Number = float;
static inline Number number(bf16 x) { return to_float(x); }

#include "row_major.h"

// Weights come from memory, and processors look less far ahead than it takes. One row or two go at memory's pace: they
// ask for what comes so many bytes later. With more rows a block takes long enough to ask for the whole next one.
constexpr int64_t AHEAD = 1024;
static inline int64_t ahead(int64_t rows, int64_t width, int64_t k) { return rows <= 2 ? AHEAD : width * LANES * k * 2; }

// c = a w^T of R rows and C vectors of columns, in a block of WIDTH vectors.
template <int R, int C, int WIDTH>
static inline void sum_rows(const float* a, const bf16* w, int64_t k, float* c) {
    V sums[R][C];
    for (auto& row : sums)
        for (auto& sum : row) sum = zero();
    const int64_t soon = ahead(R, WIDTH, k);
    for (int64_t pair = 0; pair < k / 2; ++pair, w += WIDTH * LANES * 2) {
        for (int byte = 0; byte < C * LANES * 4; byte += 64) prefetch(reinterpret_cast<const char*>(w) + soon + byte);
        for (int v = 0; v < C; ++v) {
            const V first = low(w + v * LANES * 2), second = high(w + v * LANES * 2);
            for (int i = 0; i < R; ++i) {
                sums[i][v] = multiply_add(spread(a[i * k + 2 * pair]), first, sums[i][v]);
                sums[i][v] = multiply_add(spread(a[i * k + 2 * pair + 1]), second, sums[i][v]);
            }
        }
    }
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < C; ++v) store(c + i * BLOCK + v * LANES, sums[i][v]);
}

// As many rows as there are registers for, again and again; gives how many of `rows` that were.
template <int WIDTH>
static int64_t many_rows(const float* a, const bf16* w, int64_t k, int64_t rows, float* c);

template <int WIDTH>
static void float_tile(const float* a, const bf16* w, int64_t k, int64_t rows, float* c) {
    int64_t i = many_rows<WIDTH>(a, w, k, rows, c);
    for (; i + 2 <= rows; i += 2) sum_rows<2, WIDTH, WIDTH>(a + i * k, w, k, c + i * BLOCK);
    if (i < rows) sum_rows<1, WIDTH, WIDTH>(a + i * k, w, k, c + i * BLOCK);
}

static void tile(const float* a, const bf16* w, int64_t k, int64_t rows, int64_t columns, float* c) {
    columns == BLOCK ? float_tile<BLOCK / LANES>(a, w, k, rows, c) : float_tile<BLOCK / 2 / LANES>(a, w, k, rows, c);
}
