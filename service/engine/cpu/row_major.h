// Input for instruction sets that broadcast it: rows as they are, [rows][k] for each group of BLOCK rows, each number as
// `number` makes it.
static void pack_rows(const bf16* x, int64_t stride, int64_t rows, int64_t k, Number* a) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < k; ++j) a[i * k + j] = number(x[i * stride + j]);
}

static inline void place(Number* a, int64_t width, int64_t, int64_t i, int64_t column, int64_t columns, const bf16* line) {
    for (int64_t j = 0; j < columns; ++j) a[i * width + column + j] = number(line[j]);
}

static inline void clear_padding(Number*, int64_t, int64_t, int64_t, int64_t) {}

static inline void begin_item() {}
static inline void end_item() {}
