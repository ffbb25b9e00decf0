// What crosses between Python and the kernels, and between the kernels' files. ctypes mirrors these structures
// (service/engine/cpu/library.py).
//
// A packed matrix: the rows of a torch.nn.Linear weight [n][k] in blocks of 32, each block as pairs along k:
// [n/32][k/2][32][2]; a last block of 16 rows is [k/2][16][2]. A block takes the place of its own rows, so packing
// needs no memory. Every instruction set reads this one form: a pair is what a bf16 dot product takes, 16 pairs are
// a row of a tile.
#pragma once
#include "common.h"

constexpr int64_t BLOCK = 32;  // rows of a weight block; also the most rows of input that a kernel takes at once

struct Weight {
    const bf16* packed;
    const bf16* bias;  // [n], or null
    int64_t n, k;      // n a multiple of 16, k of 32
};

struct Layer {
    Weight q, k, v, o, gate, up, down;
    const bf16 *norm1, *norm2;          // [hidden]
    const bf16 *q_norm, *k_norm;        // [head_dim], or null
    bf16 *k_pool, *v_pool;              // of snug_attention
    int64_t heads, kv_heads, head_dim;
    float eps, scale;
    int64_t window;                     // 0: none
};

struct Step {
    int64_t tokens;
    const bf16 *cos, *sin;              // [tokens][head_dim]
    const int64_t* slots;               // [tokens]
    const int32_t* tables;              // [sequences][table_stride]
    int64_t table_stride;
    const int32_t *cu_seqlens, *starts;
    int64_t sequences;
    bf16* scratch;                      // snug_layer_scratch(...) elements
};

enum Activation { SILU = 0, GELU_TANH = 1, GELU = 2 };

// What each instruction set brings.
struct Ops {
    void (*pack)(bf16* w, int64_t n, int64_t k);
    int64_t (*linear_scratch)(int64_t m, int64_t k);
    void (*linear)(const bf16* x, int64_t stride, int64_t m, const Weight* w, bf16* out, int64_t out_stride, bf16* scratch);
    int64_t (*gated_scratch)(int64_t m, int64_t k, int64_t inner);
    void (*gated)(const bf16* x, int64_t stride, int64_t m, const Weight* gate, const Weight* up, const Weight* down, int activation, bf16* out, int64_t out_stride, bf16* scratch);
    void (*rms_norm)(const bf16* x, const bf16* weight, float eps, int64_t m, int64_t n, bf16* out);
    int64_t (*layer_scratch)(int64_t m, int64_t hidden, int64_t q_width, int64_t kv_width, int64_t inner);
    void (*layer)(const Layer*, const Step*, bf16* hidden);
};

extern OURS const Ops plain_ops, avx2_ops, avx512_ops, avx512_bf16_ops, amx_ops;

// attention.cpp
extern "C" {
void snug_store_kv(const bf16* k, int64_t k_stride, int64_t k_head_stride, const bf16* v, int64_t v_stride, int64_t v_head_stride, const int64_t* slots, int64_t tokens, int64_t kv_heads, int64_t head_dim, bf16* k_pool, bf16* v_pool);
void snug_attention(const bf16* q, int64_t q_stride, int64_t q_head_stride, const bf16* k_pool, const bf16* v_pool, const int32_t* tables, int64_t table_stride, const int32_t* cu_seqlens, const int32_t* starts, int64_t n, int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, int64_t window, float softcap, bf16* out, int64_t out_stride);
}
