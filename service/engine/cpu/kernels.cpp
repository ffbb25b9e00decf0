// What Python calls. Every pointer is to memory that the caller keeps; nothing is allocated that outlives a call.
#include "linear.h"

static const Ops& ops() {
#if defined(__x86_64__)
    switch (isa) {
        case AMX: return amx_ops;
        case AVX512_BF16: return avx512_bf16_ops;
        case AVX512: return avx512_ops;
        case AVX2: return avx2_ops;
        default: break;
    }
#endif
    return plain_ops;
}

extern "C" {

// Whether the caller's structures are as large as these: a library may be older than the Python beside it.
int snug_fits(int64_t layer_bytes, int64_t step_bytes) { return layer_bytes == sizeof(Layer) && step_bytes == sizeof(Step); }

// Packs w [n][k] in place (see linear.h). n must be a multiple of 16 and k of 32.
void snug_pack(bf16* w, int64_t n, int64_t k) { ops().pack(w, n, k); }

// out [count][k]: rows `ids` of a packed matrix, as an embedding wants them.
void snug_rows(const bf16* packed, int64_t n, int64_t k, const int64_t* ids, int64_t count, bf16* out) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t block = ids[i] / BLOCK, rows = n - block * BLOCK < BLOCK ? n - block * BLOCK : BLOCK;
        const bf16* from = packed + block * BLOCK * k + ids[i] % BLOCK * 2;
        for (int64_t pair = 0; pair < k / 2; ++pair, from += rows * 2) memcpy(out + i * k + 2 * pair, from, 4);
    }
}

// bf16 elements of scratch for m rows of input.
int64_t snug_linear_scratch(int64_t m, int64_t k) { return ops().linear_scratch(m, k); }
int64_t snug_gated_scratch(int64_t m, int64_t k, int64_t inner) { return ops().gated_scratch(m, k, inner); }
int64_t snug_layer_scratch(int64_t m, int64_t hidden, int64_t q_width, int64_t kv_width, int64_t inner) {
    return ops().layer_scratch(m, hidden, q_width, kv_width, inner);
}

void snug_linear(const bf16* x, int64_t stride, int64_t m, const Weight* w, bf16* out, int64_t out_stride, bf16* scratch) {
    ops().linear(x, stride, m, w, out, out_stride, scratch);
}

void snug_gated(const bf16* x, int64_t stride, int64_t m, const Weight* gate, const Weight* up, const Weight* down, int activation, bf16* out, int64_t out_stride, bf16* scratch) {
    ops().gated(x, stride, m, gate, up, down, activation, out, out_stride, scratch);
}

void snug_rms_norm(const bf16* x, const bf16* weight, float eps, int64_t m, int64_t n, bf16* out) {
    ops().rms_norm(x, weight, eps, m, n, out);
}

// hidden [tokens][hidden] through `count` layers, in place; layer i belongs to steps[steps_of[i]].
void snug_layers(const Layer* layers, const int64_t* steps_of, int64_t count, const Step* steps, bf16* hidden) {
    for (int64_t i = 0; i < count; ++i) ops().layer(&layers[i], &steps[steps_of[i]], hidden);
}

}
