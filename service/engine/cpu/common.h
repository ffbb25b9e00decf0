// What every kernel shares: bf16, the instruction sets, threads. Plain C ABI, no torch, no Python.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>
#include <initializer_list>

using bf16 = uint16_t;

// Names of this library alone: another one in the process may have the same.
#define OURS __attribute__((visibility("hidden")))

// In rising order: each has all of those before it on its architecture.
enum Isa { SCALAR = 0, NEON = 1, AVX2 = 2, AVX512 = 3, AVX512_BF16 = 4, AMX = 5 };
extern OURS Isa isa;  // what this process uses; set once, by snug_init

static inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define TARGET_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#define TARGET_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,fma")))

// Eight tiles of 16 rows x 64 bytes. To be called at the start of each item of work, never once for all: torch's own
// kernels configure the tiles of the same threads for themselves, and release them.
TARGET_AMX static inline void use_tiles() {
    struct __attribute__((packed)) { uint8_t palette = 1, start = 0, zero[14] = {}; uint16_t columns[16] = {}; uint8_t rows[16] = {}; } config;
    for (int i = 0; i < 8; ++i) config.columns[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}
#endif

// Runs work(data) on `n_threads` threads at once, this one among them, and returns when all are done.
OURS void run_threads(void (*work)(void*), void* data);
extern OURS int n_threads;  // set by snug_init

// f(item) for 0 <= item < items, each once, on all threads; an idle thread takes the next `run` items.
template <class F>
static inline void parallel_for(int64_t items, const F& f, int64_t run = 1) {
    struct Shared { const F* f; int64_t items, run; std::atomic<int64_t> next; } shared{&f, items, run, {0}};
    if (items <= run || n_threads == 1) {
        for (int64_t i = 0; i < items; ++i) f(i);
        return;
    }
    run_threads([](void* data) {
        auto& s = *static_cast<Shared*>(data);
        for (int64_t first; (first = s.next.fetch_add(s.run, std::memory_order_relaxed)) < s.items;)
            for (int64_t i = first; i < first + s.run && i < s.items; ++i) (*s.f)(i);
    }, &shared);
}
