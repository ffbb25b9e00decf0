// Intel AMX: 16 x 16 float32 results from 16 x 32 and 32 x 16 bf16 numbers in one instruction (TDPBF16PS).
#include <cmath>
#include "linear.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,fma")
#endif

namespace amx {

using Number = bf16;
constexpr int64_t TILE = 16 * 32;  // elements

// [k/32][1 or 2 tiles][16 rows][32]: tiles of one step along k side by side, so that loading them walks memory.
static void pack_rows(const bf16* x, int64_t stride, int64_t rows, int64_t k, bf16* a) {
    const int64_t tiles = rows > 16 ? 2 : 1;
    for (int64_t step = 0; step < k / 32; ++step)
        for (int64_t i = 0; i < 16 * tiles; ++i) {
            bf16* to = a + (step * tiles * 16 + i) * 32;
            if (i < rows) memcpy(to, x + i * stride + step * 32, 64);
            else memset(to, 0, 64);
        }
}

// One row's piece of `columns` numbers into rows that are packed like that; `a` is the group's beginning.
static inline void place(bf16* a, int64_t, int64_t rows, int64_t i, int64_t column, int64_t columns, const bf16* line) {
    const int64_t tiles = rows > 16 ? 2 : 1;
    memcpy(a + (column / 32 * tiles * 16 + i) * 32 + column % 32, line, size_t(columns) * sizeof(bf16));
}

static inline void clear_padding(bf16* a, int64_t, int64_t rows, int64_t column, int64_t) {
    const int64_t tiles = rows > 16 ? 2 : 1;
    for (int64_t i = rows; i < 16 * tiles; ++i) memset(a + (column / 32 * tiles * 16 + i) * 32, 0, 64);
}

// The intrinsics are statements in GCC, and do not tell the compiler what memory they read.
static void tile(const bf16* a, const bf16* w, int64_t k, int64_t rows, int64_t columns, float* c) {
    asm volatile("" ::: "memory");
    const int64_t steps = k / 32, line = columns * 4;  // bytes of a row of pairs
    const bool tall = rows > 16, wide = columns > 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (tall && wide) {
        for (int64_t s = 0; s < steps; ++s, a += 2 * TILE, w += 2 * TILE) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, w, 128);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, w + 32, 128);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    } else if (wide) {
        for (int64_t s = 0; s < steps; ++s, a += TILE, w += 2 * TILE) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, w, 128);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, w + 32, 128);
            _tile_dpbf16ps(1, 4, 7);
        }
    } else {
        for (int64_t s = 0; s < steps; ++s, a += (tall ? 2 : 1) * TILE, w += TILE) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, w, line);
            _tile_dpbf16ps(0, 4, 6);
            if (tall) {
                _tile_loadd(5, a + TILE, 64);
                _tile_dpbf16ps(2, 5, 6);
            }
        }
    }
    _tile_stored(0, c, BLOCK * 4);
    if (wide) {
        _tile_stored(1, c + 16, BLOCK * 4);
    }
    if (tall) {
        _tile_stored(2, c + 16 * BLOCK, BLOCK * 4);
    }
    if (tall && wide) {
        _tile_stored(3, c + 16 * BLOCK + 16, BLOCK * 4);
    }
}

static inline void begin_item() { use_tiles(); }
static inline void end_item() { _tile_release(); }

#include "ops.h"

}  // namespace amx

const Ops amx_ops = OPS_OF(amx);

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
