// The algorithms, the same for every instruction set. Each linear_*.cpp includes this file after it has said what the
// compiler may use, and after its `tile` and `pack_rows`, and what they hold packed input in: Number. So every loop
// here is compiled for each of them.
//
// A row's result never depends on the other rows: sums run along k in one order, whatever `m` is.

// exp with a relative error of 2e-7 in a form that compilers vectorize (Cephes' expf); saturates instead of overflowing.
static inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

static inline float rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline bf16 narrowed(float x) {  // of a number that is finite
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Rows of input, packed as `tile` wants them. Rows beyond m in the last group are zero.
static void pack_input(const bf16* x, int64_t stride, int64_t m, int64_t k, Number* a) {
    parallel_for((m + BLOCK - 1) / BLOCK, [=](int64_t group) {
        const int64_t first = group * BLOCK, rows = m - first < BLOCK ? m - first : BLOCK;
        pack_rows(x + first * stride, stride, rows, k, a + first * k);
    });
}

// Rows of input that stay in a core's cache while all weights pass by.
static int64_t rows_at_once(int64_t k) {
    const int64_t rows = (1 << 20) / (int64_t(sizeof(Number)) * k) / BLOCK * BLOCK;
    return rows < 2 * BLOCK ? 2 * BLOCK : rows;
}

// Blocks that a thread takes at a time. A few side by side are read faster than single ones, but with few blocks to
// each thread the last one would keep the others waiting.
static int64_t blocks_at_once(int64_t blocks) { return blocks >= 16 * n_threads ? 4 : 1; }

// use(w, row, rows, column, columns, c) for each block of each product of `a` (packed) and `count` weights of equal k;
// c is [rows][BLOCK] in float32, bias not added.
template <class Use>
static void multiply(const Number* a, int64_t m, const Weight* weights, int count, const Use& use) {
    const int64_t k = weights[0].k, at_once = rows_at_once(k), chunks = (m + at_once - 1) / at_once;
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) blocks += (weights[i].n + BLOCK - 1) / BLOCK;
    parallel_for(chunks * blocks, [&](int64_t item) {
        const int64_t begin = item / blocks * at_once, end = begin + at_once < m ? begin + at_once : m;
        int64_t block = item % blocks;
        int w = 0;
        for (; block >= (weights[w].n + BLOCK - 1) / BLOCK; ++w) block -= (weights[w].n + BLOCK - 1) / BLOCK;
        const int64_t column = block * BLOCK, columns = weights[w].n - column < BLOCK ? weights[w].n - column : BLOCK;
        alignas(64) float c[BLOCK * BLOCK];
        begin_item();
        for (int64_t row = begin; row < end; row += BLOCK) {
            const int64_t rows = end - row < BLOCK ? end - row : BLOCK;
            tile(a + row * k, weights[w].packed + column * k, k, rows, columns, c);
            use(w, row, rows, column, columns, c);
        }
        end_item();
    }, chunks == 1 ? blocks_at_once(blocks) : 1);
}

static inline void add_bias(const bf16* bias, int64_t column, int64_t columns, float* c) {
    if (bias)
        for (int64_t j = 0; j < columns; ++j) c[j] += to_float(bias[column + j]);
}

static void pack_weight(bf16* w, int64_t n, int64_t k) {
    parallel_for((n + BLOCK - 1) / BLOCK, [=](int64_t block) {
        const int64_t rows = n - block * BLOCK < BLOCK ? n - block * BLOCK : BLOCK;
        bf16 *at = w + block * BLOCK * k, *copy = new bf16[rows * k];
        memcpy(copy, at, size_t(rows * k) * sizeof(bf16));
        for (int64_t pair = 0; pair < k / 2; ++pair)
            for (int64_t row = 0; row < rows; ++row) memcpy(at + (pair * rows + row) * 2, copy + row * k + pair * 2, 4);
        delete[] copy;
    });
}

// out [m][w.n] = a W^T + bias, of packed rows.
static void product(const Number* a, int64_t m, const Weight& w, bf16* out, int64_t out_stride) {
    multiply(a, m, &w, 1, [&](int, int64_t row, int64_t rows, int64_t column, int64_t columns, float* c) {
        for (int64_t i = 0; i < rows; ++i) {
            add_bias(w.bias, column, columns, c + i * BLOCK);
            for (int64_t j = 0; j < columns; ++j) out[(row + i) * out_stride + column + j] = narrowed(c[i * BLOCK + j]);
        }
    });
}

// The scratch that a call needs, in bf16 numbers, for m rows of input, each group of 16 whole.
static int64_t packed(int64_t m, int64_t width) { return (m + 15) / 16 * 16 * width * int64_t(sizeof(Number) / sizeof(bf16)); }
static Number* as_numbers(bf16* scratch) { return reinterpret_cast<Number*>(scratch); }

static int64_t linear_scratch(int64_t m, int64_t k) { return packed(m, k); }

// out = x W^T + bias.
static void linear(const bf16* x, int64_t stride, int64_t m, const Weight* w, bf16* out, int64_t out_stride, bf16* scratch) {
    pack_input(x, stride, m, w->k, as_numbers(scratch));
    product(as_numbers(scratch), m, *w, out, out_stride);
}

// Each step rounded to bf16, as torch's operators do.
static void activate(int activation, int64_t columns, const float* gate, const float* up, bf16* out) {
    if (activation == SILU) {
        for (int64_t j = 0; j < columns; ++j) {
            const float g = rounded(gate[j]);
            out[j] = narrowed(rounded(g / (1.0f + fast_exp(-g))) * rounded(up[j]));
        }
    } else if (activation == GELU_TANH) {
        for (int64_t j = 0; j < columns; ++j) {
            const float g = rounded(gate[j]), t = 1.5957691216f * (g + 0.044715f * g * g * g);  // 2 * sqrt(2/pi)
            out[j] = narrowed(rounded(g / (1.0f + fast_exp(-t))) * rounded(up[j]));  // tanh through a sigmoid
        }
    } else {
        for (int64_t j = 0; j < columns; ++j) {
            const float g = rounded(gate[j]);
            out[j] = narrowed(rounded(0.5f * g * (1.0f + erff(g * 0.70710678f))) * rounded(up[j]));
        }
    }
}

// inner [m][up.n], packed as input = activation(a gate^T) * (a up^T).
static void gate_and_up(const Number* a, int64_t m, const Weight& gate, const Weight& up, int activation, Number* inner) {
    const int64_t k = gate.k, n = gate.n, at_once = rows_at_once(k);
    const int64_t chunks = (m + at_once - 1) / at_once, blocks = (n + BLOCK - 1) / BLOCK;
    parallel_for(chunks * blocks, [&](int64_t item) {
        const int64_t begin = item / blocks * at_once, end = begin + at_once < m ? begin + at_once : m;
        const int64_t column = item % blocks * BLOCK, columns = n - column < BLOCK ? n - column : BLOCK;
        alignas(64) float g[BLOCK * BLOCK], u[BLOCK * BLOCK];
        alignas(64) bf16 line[BLOCK];
        begin_item();
        for (int64_t row = begin; row < end; row += BLOCK) {
            const int64_t rows = end - row < BLOCK ? end - row : BLOCK;
            tile(a + row * k, gate.packed + column * k, k, rows, columns, g);
            tile(a + row * k, up.packed + column * k, k, rows, columns, u);
            for (int64_t i = 0; i < rows; ++i) {
                add_bias(gate.bias, column, columns, g + i * BLOCK);
                add_bias(up.bias, column, columns, u + i * BLOCK);
                activate(activation, columns, g + i * BLOCK, u + i * BLOCK, line);
                place(inner + row * n, n, rows, i, column, columns, line);
            }
            clear_padding(inner + row * n, n, rows, column, columns);
        }
        end_item();
    }, chunks == 1 ? blocks_at_once(blocks) : 1);
}

static int64_t gated_scratch(int64_t m, int64_t k, int64_t inner) { return packed(m, k) + packed(m, inner); }

// out = (activation(x gate^T) * (x up^T)) down^T.
static void gated(const bf16* x, int64_t stride, int64_t m, const Weight* gate, const Weight* up, const Weight* down, int activation, bf16* out, int64_t out_stride, bf16* scratch) {
    Number *a = as_numbers(scratch), *inner = as_numbers(scratch + packed(m, gate->k));
    pack_input(x, stride, m, gate->k, a);
    gate_and_up(a, m, *gate, *up, activation, inner);
    product(inner, m, *down, out, out_stride);
}

// LlamaRMSNorm: in float32, rounded, then times the weight. Lanes are summed in one order.
static void norm_row(const bf16* x, const bf16* weight, float eps, int64_t n, bf16* out) {
    float lanes[32] = {};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int j = 0; j < 32; ++j) {
            const float v = to_float(x[i + j]);
            lanes[j] += v * v;
        }
    for (; i < n; ++i) lanes[i % 32] += to_float(x[i]) * to_float(x[i]);
    float sum = 0;
    for (float lane : lanes) sum += lane;
    const float scale = 1.0f / sqrtf(sum / float(n) + eps);
    for (i = 0; i < n; ++i) out[i] = narrowed(to_float(weight[i]) * rounded(to_float(x[i]) * scale));
}

static void rms_norm(const bf16* x, const bf16* weight, float eps, int64_t m, int64_t n, bf16* out) {
    parallel_for((m + 15) / 16, [=](int64_t group) {
        const int64_t end = (group + 1) * 16 < m ? (group + 1) * 16 : m;
        for (int64_t row = group * 16; row < end; ++row) norm_row(x + row * n, weight, eps, n, out + row * n);
    });
}

// Rotary positions in place (RoFormer; halves as in GPT-NeoX), each product rounded as torch's are.
static void rotate(bf16* x, const bf16* cos, const bf16* sin, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float a = to_float(x[i]), b = to_float(x[i + half]);
        x[i] = narrowed(rounded(a * to_float(cos[i])) + rounded(-b * to_float(sin[i])));
        x[i + half] = narrowed(rounded(b * to_float(cos[i + half])) + rounded(a * to_float(sin[i + half])));
    }
}

static void norm_and_rotate(const Layer& l, const Step& s, bf16* heads, int64_t count, int64_t stride, const bf16* norm) {
    const int64_t dim = l.head_dim;
    parallel_for((s.tokens + 15) / 16, [=, &l, &s](int64_t group) {
        const int64_t end = (group + 1) * 16 < s.tokens ? (group + 1) * 16 : s.tokens;
        for (int64_t t = group * 16; t < end; ++t)
            for (int64_t h = 0; h < count; ++h) {
                bf16* head = heads + t * stride + h * dim;
                if (norm) norm_row(head, norm, l.eps, dim, head);
                rotate(head, s.cos + t * dim, s.sin + t * dim, dim);
            }
    });
}

// hidden [m][w.n] += a w^T + bias; the product is rounded before it is added, as it would be in memory.
static void add_product(const Number* a, int64_t m, const Weight& w, bf16* hidden) {
    multiply(a, m, &w, 1, [&](int, int64_t row, int64_t rows, int64_t column, int64_t columns, float* c) {
        for (int64_t i = 0; i < rows; ++i) {
            bf16* to = hidden + (row + i) * w.n + column;
            add_bias(w.bias, column, columns, c + i * BLOCK);
            for (int64_t j = 0; j < columns; ++j) to[j] = narrowed(to_float(to[j]) + rounded(c[i * BLOCK + j]));
        }
    });
}

static void norm_and_pack(const bf16* x, const bf16* weight, float eps, int64_t m, int64_t n, bf16* lines, Number* a) {
    parallel_for((m + BLOCK - 1) / BLOCK, [=](int64_t group) {
        const int64_t first = group * BLOCK, rows = m - first < BLOCK ? m - first : BLOCK;
        for (int64_t i = first; i < first + rows; ++i) norm_row(x + i * n, weight, eps, n, lines + i * n);
        pack_rows(lines + first * n, n, rows, n, a + first * n);
    });
}

// What is packed of the hidden state or of attention's output; then queries, keys, values and attention's output, or
// the rows that a norm has made, or the MLP's inner part.
static int64_t layer_scratch(int64_t m, int64_t hidden, int64_t q_width, int64_t kv_width, int64_t inner) {
    const int64_t attention = m * (2 * q_width + 2 * kv_width), norms = m * hidden;
    int64_t most = packed(m, inner) > attention ? packed(m, inner) : attention;
    most = most > norms ? most : norms;
    return packed(m, hidden > q_width ? hidden : q_width) + most;
}

// One decoder layer of the Llama kind (Llama, Mistral, Qwen2, Qwen3), in place.
static void layer(const Layer* layer_, const Step* step, bf16* hidden) {
    const Layer& l = *layer_;
    const Step& s = *step;
    const int64_t m = s.tokens, width = l.gate.k;
    const int64_t q_width = l.heads * l.head_dim, kv_width = l.kv_heads * l.head_dim, row = q_width + 2 * kv_width;
    Number* a = as_numbers(s.scratch);
    bf16 *rows = s.scratch + packed(m, width > q_width ? width : q_width), *attended = rows + m * row;

    norm_and_pack(hidden, l.norm1, l.eps, m, width, rows, a);
    const Weight qkv[] = {l.q, l.k, l.v};
    const int64_t at[] = {0, q_width, q_width + kv_width};
    multiply(a, m, qkv, 3, [&](int w, int64_t first, int64_t count, int64_t column, int64_t columns, float* c) {
        for (int64_t i = 0; i < count; ++i) {
            bf16* to = rows + (first + i) * row + at[w] + column;
            add_bias(qkv[w].bias, column, columns, c + i * BLOCK);
            for (int64_t j = 0; j < columns; ++j) to[j] = narrowed(c[i * BLOCK + j]);
        }
    });
    norm_and_rotate(l, s, rows, l.heads, row, l.q_norm);
    norm_and_rotate(l, s, rows + q_width, l.kv_heads, row, l.k_norm);
    snug_store_kv(rows + q_width, row, l.head_dim, rows + q_width + kv_width, row, l.head_dim, s.slots, m, l.kv_heads, l.head_dim, l.k_pool, l.v_pool);
    snug_attention(rows, row, l.head_dim, l.k_pool, l.v_pool, s.tables, s.table_stride, s.cu_seqlens, s.starts, s.sequences, l.heads, l.kv_heads, l.head_dim, l.scale, l.window, 0.0f, attended, q_width);
    pack_input(attended, q_width, m, q_width, a);
    add_product(a, m, l.o, hidden);

    norm_and_pack(hidden, l.norm2, l.eps, m, width, rows, a);
    gate_and_up(a, m, l.gate, l.up, SILU, as_numbers(rows));
    add_product(as_numbers(rows), m, l.down, hidden);
}

#define OPS_OF(space) \
    {space::pack_weight, space::linear_scratch, space::linear, space::gated_scratch, space::gated, space::rms_norm, space::layer_scratch, space::layer}
