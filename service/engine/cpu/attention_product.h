// Products for attention_core.h, which includes this once for each instruction set:
// C [32][G vectors] (+)= sum over steps of A [32][32] (bf16, as it lies in the cache) times B [32][G vectors].
// B is an operand that was put together by put(): rows of fp32, or rows 2i and 2i + 1 as pairs of bf16.

// Two vectors rounded to bf16, beside each other in each lane: even below, odd above.
TARGET static inline I pair(F even, F odd) {
#ifdef PAIRS_OF_BF16
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (I)_mm512_permutexvar_epi16(order, halves);
#else
    const I low = (I)even + 0x7fff + (((I)even >> 16) & 1), high = (I)odd + 0x7fff + (((I)odd >> 16) & 1);
    return ((low >> 16) & 0xffff) | (high & ~0xffff);
#endif
}

#ifdef PAIRS_OF_BF16

using Operand = I;
template <int G>
constexpr int operand_size(int rows) { return rows / 2 * G; }

template <int G>
TARGET static inline void put(I* operand, int row, int g, F even, F odd) { operand[row / 2 * G + g] = pair(even, odd); }

template <int G>
TARGET static void put_query(I* operand, const Call& call, const Item& item) {
    for (int64_t i = 0; i < call.head_dim / 2 * G; ++i) operand[i] = I{};
    for (int64_t c = 0; c < item.columns; ++c) {
        const bf16 *from = query_of(call, item, c), *end = from + call.head_dim;
        for (auto to = (int32_t*)operand + c; from < end; from += 2, to += G * LANES) memcpy(to, from, 4);
    }
}

#else

using Operand = F;
template <int G>
constexpr int operand_size(int rows) { return rows * G; }

template <int G>
TARGET static inline void put(F* operand, int row, int g, F even, F odd) {
    operand[row * G + g] = even;
    operand[row * G + G + g] = odd;
}

template <int G>
TARGET static void put_query(F* operand, const Call& call, const Item& item) {
    for (int64_t i = 0; i < call.head_dim * G; ++i) operand[i] = F{};
    for (int64_t c = 0; c < item.columns; ++c) {
        const bf16 *from = query_of(call, item, c), *end = from + call.head_dim;
        for (auto to = (float*)operand + c; from < end; ++from, to += G * LANES) *to = to_float(*from);
    }
}

#endif

#ifdef TILES

template <int G>
TARGET static void multiply(F (*c)[G], const bf16* const* a, int64_t a_stride, const I* b, int steps, bool add) {
    asm volatile("" ::: "memory");  // the loads of tiles do not tell the compiler that they read memory
    constexpr int64_t row = G * sizeof(F);
    if (add) {
        _tile_loadd(0, c, row);
        _tile_loadd(1, c + 16, row);
        if (G > 1) {
            _tile_loadd(2, &c[0][G - 1], row);
            _tile_loadd(3, &c[16][G - 1], row);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (G > 1) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    for (int s = 0; s < steps; ++s, b += 16 * G) {
        _tile_loadd(4, a[s], a_stride * 2);
        _tile_loadd(6, b, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a[s] + 16 * a_stride, a_stride * 2);
        _tile_dpbf16ps(1, 5, 6);
        if (G > 1) {
            _tile_loadd(7, b + G - 1, row);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, row);
    _tile_stored(1, c + 16, row);
    if (G > 1) {
        _tile_stored(2, &c[0][G - 1], row);
        _tile_stored(3, &c[16][G - 1], row);
    }
}

#else

template <int G>
TARGET static void multiply(F (*c)[G], const bf16* const* a, int64_t a_stride, const Operand* b, int steps, bool add) {
    constexpr int ROWS = LANES == 16 ? 8 : 4;  // as many sums as there are registers for
    for (int row = 0; row < 32; row += ROWS, c += ROWS) {
        F sums[ROWS][G];
        for (int r = 0; r < ROWS; ++r) for (int g = 0; g < G; ++g) sums[r][g] = add ? c[r][g] : F{};
        for (int s = 0; s < steps; ++s) {
            const bf16* from = a[s] + row * a_stride;
            const Operand* with = b + s * operand_size<G>(32);
            for (int k = 0; k < 32; k += 2, with += operand_size<G>(2)) {
                for (int r = 0; r < ROWS; ++r) {
                    int32_t two;
                    memcpy(&two, from + r * a_stride + k, 4);
#ifdef PAIRS_OF_BF16
                    for (int g = 0; g < G; ++g) {
                        sums[r][g] = (F)_mm512_dpbf16_ps((__m512)sums[r][g], (__m512bh)with[g], (__m512bh)all(two));
                    }
#else
                    const F low = (F)(all(two) << 16), high = (F)(all(two) & ~0xffff);
                    for (int g = 0; g < G; ++g) {
                        sums[r][g] += low * with[g];
                        sums[r][g] += high * with[G + g];
                    }
#endif
                }
            }
        }
        for (int r = 0; r < ROWS; ++r) for (int g = 0; g < G; ++g) c[r][g] = sums[r][g];
    }
}

#endif
