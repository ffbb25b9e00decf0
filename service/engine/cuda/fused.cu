// What a decoder layer of the Llama kind does between its matrix products, rounded where transformers rounds.
// HALF_IS_BF16 is 1 or 0. Rows are `width` numbers side by side; widths are multiples of 8.

typedef unsigned short half_t;

constexpr int WARP = 32, VECTOR = 8, MOST_VECTORS = 4;

struct alignas(16) Vector {  // one load
    half_t values[VECTOR];
};

__device__ __forceinline__ float widen(half_t x) {
#if HALF_IS_BF16
    return __uint_as_float(static_cast<unsigned>(x) << 16);
#else
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
#endif
}

__device__ __forceinline__ half_t narrow(float x) {
    half_t narrowed;
#if HALF_IS_BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrowed) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrowed) : "f"(x));
#endif
    return narrowed;
}

__device__ __forceinline__ float rounded(float x) { return widen(narrow(x)); }

__device__ __forceinline__ float warp_sum(float x) {
    for (int lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

__device__ __forceinline__ float block_sum(float x) {
    __shared__ float sums[WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    x = warp_sum(x);
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    return warp_sum(lane < blockDim.x / WARP ? sums[lane] : 0.0f);
}

// A block a row. hidden += delta, if there is a delta; out = LlamaRMSNorm(hidden).
extern "C" __global__ void add_rms_norm(
    half_t* hidden, const half_t* delta, const half_t* weight, half_t* out, int width, float eps
) {
    const size_t row = static_cast<size_t>(blockIdx.x) * width;
    Vector kept[MOST_VECTORS];
    float squares = 0.0f;
#pragma unroll
    for (int n = 0; n < MOST_VECTORS; n++) {
        const int at = (n * blockDim.x + threadIdx.x) * VECTOR;
        if (at >= width) break;
        Vector own = *reinterpret_cast<const Vector*>(hidden + row + at);
        if (delta != nullptr) {
            const Vector more = *reinterpret_cast<const Vector*>(delta + row + at);
#pragma unroll
            for (int i = 0; i < VECTOR; i++)
                own.values[i] = narrow(widen(own.values[i]) + widen(more.values[i]));
            *reinterpret_cast<Vector*>(hidden + row + at) = own;
        }
#pragma unroll
        for (int i = 0; i < VECTOR; i++) squares += widen(own.values[i]) * widen(own.values[i]);
        kept[n] = own;
    }
    const float scale = rsqrtf(block_sum(squares) / width + eps);
#pragma unroll
    for (int n = 0; n < MOST_VECTORS; n++) {
        const int at = (n * blockDim.x + threadIdx.x) * VECTOR;
        if (at >= width) break;
        const Vector by = *reinterpret_cast<const Vector*>(weight + at);
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
            kept[n].values[i] = narrow(widen(by.values[i]) * rounded(widen(kept[n].values[i]) * scale));
        *reinterpret_cast<Vector*>(out + row + at) = kept[n];
    }
}

__device__ __forceinline__ void norm_and_rotate(
    half_t* head, half_t* out, const half_t* norm, const half_t* cos, const half_t* sin, int head_dim,
    float eps, int lane
) {
    const int half = head_dim / 2;
    float scale = 0.0f;
    if (norm != nullptr) {
        for (int i = lane; i < head_dim; i += WARP) scale += widen(head[i]) * widen(head[i]);
        scale = rsqrtf(warp_sum(scale) / head_dim + eps);
    }
    for (int i = lane; i < half; i += WARP) {
        float low = widen(head[i]), high = widen(head[i + half]);
        if (norm != nullptr) {
            low = rounded(widen(norm[i]) * rounded(low * scale));
            high = rounded(widen(norm[i + half]) * rounded(high * scale));
        }
        out[i] = narrow(rounded(low * widen(cos[i])) + rounded(-high * widen(sin[i])));
        out[i + half] = narrow(rounded(high * widen(cos[i + half])) + rounded(low * widen(sin[i + half])));
    }
}

// A warp a head of a token: queries are rotated in place, keys into their slots; values go into theirs.
// q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim], pools [slots, kv_heads, head_dim].
extern "C" __global__ void rotate_and_store(
    half_t* q, half_t* k, const half_t* v, const half_t* cos, const half_t* sin, const half_t* q_norm,
    const half_t* k_norm, const long long* slots, half_t* k_pool, half_t* v_pool, int tokens, int heads,
    int kv_heads, int head_dim, float eps
) {
    const int each = heads + 2 * kv_heads, lane = threadIdx.x % WARP;
    const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const int token = warp / each, which = warp % each;
    if (token >= tokens) return;
    const half_t* cosines = cos + static_cast<size_t>(token) * head_dim;
    const half_t* sines = sin + static_cast<size_t>(token) * head_dim;
    if (which < heads) {
        half_t* head = q + (static_cast<size_t>(token) * heads + which) * head_dim;
        norm_and_rotate(head, head, q_norm, cosines, sines, head_dim, eps, lane);
        return;
    }
    const int at = (which - heads) % kv_heads;
    const size_t from = (static_cast<size_t>(token) * kv_heads + at) * head_dim;
    const size_t to = (static_cast<size_t>(slots[token]) * kv_heads + at) * head_dim;
    if (which < heads + kv_heads) {
        norm_and_rotate(k + from, k_pool + to, k_norm, cosines, sines, head_dim, eps, lane);
        return;
    }
    for (int i = lane; i < head_dim; i += WARP) v_pool[to + i] = v[from + i];
}

// gate = silu(gate) * up, `vectors` times eight numbers.
extern "C" __global__ void silu_times(half_t* gate, const half_t* up, long long vectors) {
    const long long at = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= vectors) return;
    Vector own = reinterpret_cast<const Vector*>(gate)[at];
    const Vector other = reinterpret_cast<const Vector*>(up)[at];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        const float x = widen(own.values[i]);
        own.values[i] = narrow(rounded(x / (1.0f + expf(-x))) * widen(other.values[i]));
    }
    reinterpret_cast<Vector*>(gate)[at] = own;
}

// Sums over a row of `weights` times each of ROWS rows of x, in every lane of the warp. Rows are `vectors`
// times eight numbers. A weight is read once and not kept; x stays in the cache.
template <int ROWS>
__device__ __forceinline__ void dots(
    const half_t* weights, const half_t* x, long long vectors, int lane, float (&sums)[ROWS]
) {
    constexpr int AHEAD = 4;  // loads that are on their way together
    const uint4* row = reinterpret_cast<const uint4*>(weights);
    const Vector* by = reinterpret_cast<const Vector*>(x);
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r] = 0.0f;
    for (long long first = lane; first < vectors; first += AHEAD * WARP) {
        uint4 loaded[AHEAD];
#pragma unroll
        for (int n = 0; n < AHEAD; n++) {
            const long long at = first + n * WARP;
            loaded[n] = at < vectors ? __ldcs(row + at) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int n = 0; n < AHEAD; n++) {
            const long long at = first + n * WARP;
            if (at >= vectors) break;
            const Vector own = *reinterpret_cast<const Vector*>(&loaded[n]);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const Vector other = by[r * vectors + at];
#pragma unroll
                for (int i = 0; i < VECTOR; i++) sums[r] += widen(own.values[i]) * widen(other.values[i]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r] = warp_sum(sums[r]);
}

struct Matrix {
    const half_t* weight;  // [n, k]
    const half_t* bias;    // [n], or null
    half_t* out;           // [ROWS, n]
    long long n;
};

__device__ __forceinline__ float plus_bias(float sum, const Matrix& m, long long at) {
    return m.bias == nullptr ? sum : sum + widen(m.bias[at]);
}

// A few rows of numbers times up to three matrices, one after the other: a warp a column of the outcome.
template <int ROWS>
__device__ __forceinline__ void matrices(const half_t* x, Matrix a, Matrix b, Matrix c, long long k) {
    const int lane = threadIdx.x % WARP;
    long long at = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
    Matrix m = a;
    if (at >= m.n) at -= m.n, m = b;
    if (at >= m.n) at -= m.n, m = c;
    if (at >= m.n) return;
    float sums[ROWS];
    dots<ROWS>(m.weight + at * k, x, k / VECTOR, lane, sums);
    if (lane != 0) return;
#pragma unroll
    for (int r = 0; r < ROWS; r++) m.out[r * m.n + at] = narrow(plus_bias(sums[r], m, at));
}

// The same of a gated MLP's two matrices: out = silu(gate) * up.
template <int ROWS>
__device__ __forceinline__ void gated(const half_t* x, Matrix gate, Matrix up, long long k) {
    const int lane = threadIdx.x % WARP;
    const long long at = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
    if (at >= gate.n) return;
    float gates[ROWS], ups[ROWS];
    dots<ROWS>(gate.weight + at * k, x, k / VECTOR, lane, gates);
    dots<ROWS>(up.weight + at * k, x, k / VECTOR, lane, ups);
    if (lane != 0) return;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float one = rounded(plus_bias(gates[r], gate, at)), other = rounded(plus_bias(ups[r], up, at));
        gate.out[r * gate.n + at] = narrow(rounded(one / (1.0f + expf(-one))) * other);
    }
}

#define FOR_ROWS(ROWS) \
    extern "C" __global__ void times_matrices_##ROWS( \
        const half_t* x, Matrix a, Matrix b, Matrix c, long long k \
    ) { \
        matrices<ROWS>(x, a, b, c, k); \
    } \
    extern "C" __global__ void times_gated_##ROWS(const half_t* x, Matrix gate, Matrix up, long long k) { \
        gated<ROWS>(x, gate, up, k); \
    }

FOR_ROWS(1)
FOR_ROWS(2)
