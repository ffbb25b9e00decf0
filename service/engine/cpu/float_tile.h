// `tile` for instruction sets without bf16 dot products: pairs are widened to float32, which is exact, and multiplied
// there. Needs V (a vector of LANES floats) with zero(), spread(float), multiply_add(a, b, c), store(float*, V), and
// low / high: the first and the second numbers of LANES pairs.
template <int ROWS, int VECTORS>
static void float_rows(const bf16* a, const bf16* w, int64_t k, float* c) {
    V sums[ROWS][VECTORS];
    for (auto& row : sums)
        for (auto& sum : row) sum = zero();
    for (int64_t pair = 0; pair < k / 2; ++pair, w += VECTORS * LANES * 2)
        for (int v = 0; v < VECTORS; ++v) {
            const V first = low(w + v * LANES * 2), second = high(w + v * LANES * 2);
            for (int i = 0; i < ROWS; ++i) {
                sums[i][v] = multiply_add(spread(to_float(a[i * k + 2 * pair])), first, sums[i][v]);
                sums[i][v] = multiply_add(spread(to_float(a[i * k + 2 * pair + 1])), second, sums[i][v]);
            }
        }
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECTORS; ++v) store(c + i * BLOCK + v * LANES, sums[i][v]);
}

template <int VECTORS>
static void float_columns(const bf16* a, const bf16* w, int64_t k, int64_t rows, float* c) {
    int64_t i = 0;
    for (; i + 2 <= rows; i += 2) float_rows<2, VECTORS>(a + i * k, w, k, c + i * BLOCK);
    if (i < rows) float_rows<1, VECTORS>(a + i * k, w, k, c + i * BLOCK);
}

static void tile(const bf16* a, const bf16* w, int64_t k, int64_t rows, int64_t columns, float* c) {
    columns == BLOCK ? float_columns<BLOCK / LANES>(a, w, k, rows, c) : float_columns<BLOCK / 2 / LANES>(a, w, k, rows, c);
}
