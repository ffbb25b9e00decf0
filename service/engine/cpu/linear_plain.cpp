// Processors with nothing special, and NEON, which every 64-bit Arm has.
#include <cmath>
#include "linear.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace plain {

#if defined(__aarch64__)
using V = float32x4_t;
constexpr int LANES = 4;
static inline V zero() { return vdupq_n_f32(0); }
static inline V spread(float x) { return vdupq_n_f32(x); }
static inline V multiply_add(V a, V b, V c) { return vfmaq_f32(c, a, b); }
static inline void store(float* to, V x) { vst1q_f32(to, x); }
static inline uint32x4_t load(const bf16* pairs) { return vreinterpretq_u32_u16(vld1q_u16(pairs)); }
static inline V low(const bf16* pairs) { return vreinterpretq_f32_u32(vshlq_n_u32(load(pairs), 16)); }
static inline V high(const bf16* pairs) { return vreinterpretq_f32_u32(vandq_u32(load(pairs), vdupq_n_u32(0xffff0000))); }
#else
using V = float;
constexpr int LANES = 1;
static inline V zero() { return 0; }
static inline V spread(float x) { return x; }
static inline V multiply_add(V a, V b, V c) { return a * b + c; }
static inline void store(float* to, V x) { *to = x; }
static inline V low(const bf16* pairs) { return to_float(pairs[0]); }
static inline V high(const bf16* pairs) { return to_float(pairs[1]); }
#endif
static inline void prefetch(const char* at) { __builtin_prefetch(at); }

#include "float_tile.h"

template <int WIDTH>
static int64_t many_rows(const float*, const bf16*, int64_t, int64_t, float*) { return 0; }

#include "ops.h"

}  // namespace plain

const Ops plain_ops = OPS_OF(plain);
