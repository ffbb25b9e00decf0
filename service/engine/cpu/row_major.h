// Input for instruction sets that broadcast it: rows as they are, [rows][k] for each group of BLOCK rows.
static void pack_rows(const bf16* x, int64_t stride, int64_t rows, int64_t k, bf16* a) {
    for (int64_t i = 0; i < rows; ++i) memcpy(a + i * k, x + i * stride, size_t(k) * sizeof(bf16));
}

static inline void place(bf16* a, int64_t width, int64_t, int64_t i, int64_t column, int64_t columns, const bf16* line) {
    memcpy(a + i * width + column, line, size_t(columns) * sizeof(bf16));
}

static inline void clear_padding(bf16*, int64_t, int64_t, int64_t, int64_t) {}

static inline void begin_item() {}
static inline void end_item() {}
