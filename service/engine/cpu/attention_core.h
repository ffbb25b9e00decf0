// The algorithm of attention.cpp for one instruction set; included once for each, with
//   NAME            its namespace
//   TARGET          its target attribute
//   LANES           floats in a vector
//   PAIRS_OF_BF16   multiply pairs of bf16 (dpbf16); else operands become fp32
//   TILES           multiply by AMX
// A multiplication feeds an addition only where the two are meant to be fused: results must not depend on what a
// compiler makes of one instance of a template and of another.

namespace NAME {

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));

TARGET static inline F all(float x) { return x - F{}; }
TARGET static inline I all(int32_t x) { return x + I{}; }
TARGET static inline F larger(F a, F b) {
#if LANES == 16
    return (F)_mm512_max_ps((__m512)a, (__m512)b);  // what follows is this, but compilers do not see it
#elif LANES == 8
    return (F)_mm256_max_ps((__m256)a, (__m256)b);
#endif
    return a > b ? a : b;
}

#include "attention_product.h"

// 2^x within 3e-7 of it for x <= 127: exactly 1 at 0, exactly 0 below -126.5.
TARGET static inline F power_of_two(F x) {
    const F magic = all(12582912.0f + 127.0f);  // 1.5 * 2^23: adding it leaves a whole number in the low bits
    x = larger(x, all(-127.0f));
    const F whole = x + magic;
    const F rest = x - (whole - magic);
    F sum = all(1.32647273e-3f);
    sum = sum * rest + all(9.67151299e-3f);
    sum = sum * rest + all(5.55073358e-2f);
    sum = sum * rest + all(2.40222424e-1f);
    sum = sum * rest + all(6.93147004e-1f);
    sum = sum * rest + all(1.0f);
    return sum * (F)((U)whole << 23);
}

TARGET static inline F tanh_of(F x) {
    x = larger(all(-20.0f), x < all(20.0f) ? x : all(20.0f));
    return all(1.0f) - all(2.0f) / (power_of_two(x * all(2.88539008f)) + all(1.0f));
}

// A softmax so far: of the keys seen, the largest score (times log2 e), the sum of weights, and weighted values.
template <int G>
struct State {
    F top[G], sum[G], values[MAX_HEAD][G];
};

template <int G>
TARGET static inline void scale_by(const F (&factor)[G], int64_t dims, State<G>& state) {
    for (int g = 0; g < G; ++g) state.sum[g] *= factor[g];
    for (int64_t d = 0; d < dims; ++d) {
        for (int g = 0; g < G; ++g) state.values[d][g] *= factor[g];
    }
}

// The part of an item that a round needs: which keys each column sees.
template <int G>
struct Sight {
    I first[G], last[G];
    int64_t all_from, all_to;  // keys that every column sees: none of these needs a look at first and last

    TARGET Sight(const Call& call, const Item& item) {
        for (int c = 0; c < G * LANES; ++c) {
            const Column column(call, item, item.column + std::min<int64_t>(c, item.columns - 1));
            first[c / LANES][c % LANES] = int32_t(column.first);
            last[c / LANES][c % LANES] = int32_t(column.last);
            if (c == 0) all_to = column.last;
            all_from = column.first;
        }
    }
};

// Scores of a round to weights, in place of `scores` and as the operand of the product with V; the state follows.
// key: of the first score; those of a round are consecutive.
template <int G>
TARGET static void soften(F (*scores)[G], Operand* weights, int64_t key, int keys, const Sight<G>& sight,
                          const Call& call, State<G>& state) {
    const bool partly = key < sight.all_from || key + keys > sight.all_to;
    const F scale = all((call.softcap > 0 ? 1.0f : call.scale) * 1.44269504f);
    const F cap = all(call.softcap), inverse_cap = all(call.softcap > 0 ? call.scale / call.softcap : 0.0f);
    F factor[G], sums[G];
    bool changed = false;
    for (int g = 0; g < G; ++g) {
        F top[4] = {all(-INFINITY), all(-INFINITY), all(-INFINITY), all(-INFINITY)};
        for (int k = 0; k < keys; k += 4) {
            for (int i = 0; i < 4; ++i) {
                F score = scores[k + i][g];
                if (call.softcap > 0) score = cap * tanh_of(score * inverse_cap);
                if (partly) {
                    const I at = all(int32_t(key + k + i));
                    score = ((at >= sight.first[g]) & (at < sight.last[g])) ? score : all(-INFINITY);
                }
                if (partly || call.softcap > 0) scores[k + i][g] = score;
                top[i] = larger(top[i], score);
            }
        }
        const F highest = larger(larger(top[0], top[1]), larger(top[2], top[3])) * scale;
        const F before = state.top[g], now = larger(before, highest);
        state.top[g] = now;
        factor[g] = power_of_two(before - now);
        changed |= memcmp(&before, &now, sizeof now) != 0;
        F sum[2] = {};
        for (int k = 0; k < keys; k += 2) {
            const F even = power_of_two(scores[k][g] * scale - now);
            const F odd = power_of_two(scores[k + 1][g] * scale - now);
            sum[0] += even;
            sum[1] += odd;
            put<G>(weights, k, g, even, odd);
        }
        sums[g] = sum[0] + sum[1];
    }
    if (changed) scale_by<G>(factor, call.head_dim, state);  // else they are all 1
    for (int g = 0; g < G; ++g) state.sum[g] += sums[g];
}

template <int G>
TARGET static void attend_span(const Call& call, const Item& item, int64_t span, State<G>& state) {
    const int64_t dims = call.head_dim, length = call.length(item.sequence);
    alignas(64) Operand query[operand_size<G>(MAX_HEAD)], weights[operand_size<G>(ROUND * BLOCK)];
    alignas(64) F scores[ROUND * BLOCK][G];
    alignas(64) bf16 tail[MAX_HEAD * BLOCK];
#ifdef TILES
    use_tiles();
#endif
    put_query<G>(query, call, item);
    const Sight<G> sight(call, item);
    for (int g = 0; g < G; ++g) state.top[g] = all(-1e30f), state.sum[g] = F{};
    for (int64_t d = 0; d < dims; ++d) {
        for (int g = 0; g < G; ++g) state.values[d][g] = F{};
    }

    int64_t block = std::max(item.first, span * SPAN) / BLOCK;
    const int64_t end = (std::min(item.last, (span + 1) * SPAN) + BLOCK - 1) / BLOCK;
    while (block < end) {
        const int64_t begin = block, round = std::min(end, (block / ROUND + 1) * ROUND);
        const bf16 *values[ROUND], *operands[std::max(ROUND, MAX_HEAD / 32)];
        int n = 0;
        for (; block < round; ++block, ++n) {
            const int64_t at = call.block_at(item.sequence, item.kv_head, block);
            for (int64_t d = 0; d < dims; d += 32) operands[d / 32] = call.k_pool + at + d;
            multiply<G>(scores + n * BLOCK, operands, dims, query, int(dims / 32), false);
            values[n] = call.v_pool + at;
        }
        if (block * BLOCK > length) {  // what lies behind the sequence's end was never written: 0 * NaN is NaN
            for (int64_t d = 0; d < dims; ++d) {
                for (int t = 0; t < BLOCK; ++t) {
                    tail[d * BLOCK + t] = (block - 1) * BLOCK + t < length ? values[n - 1][d * BLOCK + t] : bf16(0);
                }
            }
            values[n - 1] = tail;
        }
        soften<G>(scores, weights, begin * BLOCK, n * BLOCK, sight, call, state);
        for (int64_t d = 0; d < dims; d += 32) {
            for (int i = 0; i < n; ++i) operands[i] = values[i] + d * BLOCK;
            multiply<G>(state.values + d, operands, BLOCK, weights, n, true);
        }
    }
#ifdef TILES
    _tile_release();
#endif
}

// The softmax over the keys of both, into the first.
template <int G>
TARGET static void join(int64_t dims, State<G>& into, State<G>& other) {
    F factor[G], other_factor[G];
    for (int g = 0; g < G; ++g) {
        const F top = larger(into.top[g], other.top[g]);
        factor[g] = power_of_two(into.top[g] - top);
        other_factor[g] = power_of_two(other.top[g] - top);
        into.top[g] = top;
    }
    scale_by<G>(factor, dims, into);
    scale_by<G>(other_factor, dims, other);
    for (int g = 0; g < G; ++g) into.sum[g] += other.sum[g];
    for (int64_t d = 0; d < dims; ++d) {
        for (int g = 0; g < G; ++g) into.values[d][g] += other.values[d][g];
    }
}

template <int G>
TARGET static void write(const Call& call, const Item& item, const State<G>& state) {
    alignas(64) I pairs[MAX_HEAD / 2][G];
    for (int g = 0; g < G; ++g) {
        const F inverse = all(1.0f) / state.sum[g];
        for (int64_t d = 0; d < call.head_dim; d += 2) {
            pairs[d / 2][g] = pair(state.values[d][g] * inverse, state.values[d + 1][g] * inverse);
        }
    }
    for (int64_t c = 0; c < item.columns; ++c) {
        const Column column(call, item, item.column + c);
        bf16* out = call.out + column.token * call.out_stride + column.head * call.head_dim;
        const int32_t* from = (const int32_t*)pairs + c;
        for (bf16* end = out + call.head_dim; out < end; out += 2, from += G * LANES) memcpy(out, from, 4);
    }
}

template <int G>
TARGET static void attend_all(const Call& call, const Item& item) {
    alignas(64) State<G> state, part;
    attend_span<G>(call, item, item.first_span(), state);
    for (int64_t i = 1; i < item.spans(); ++i) {
        attend_span<G>(call, item, item.first_span() + i, part);
        join<G>(call.head_dim, state, part);
    }
    write<G>(call, item, state);
}

template <int G>
TARGET static void join_all(const Call& call, const Item& item, char* states) {
    auto& state = *(State<G>*)states;
    for (int64_t i = 1; i < item.spans(); ++i) join<G>(call.head_dim, state, *(State<G>*)(states + i * sizeof(State<2>)));
    write<G>(call, item, state);
}

// A second vector of columns shares the first one's loads of K and V.
TARGET static void attend(const Call& call, const Item& item) {
    item.columns > LANES ? attend_all<2>(call, item) : attend_all<1>(call, item);
}

TARGET static void attend_one_span(const Call& call, const Item& item, int64_t span, void* state) {
    item.columns > LANES ? attend_span<2>(call, item, span, *(State<2>*)state)
                         : attend_span<1>(call, item, span, *(State<1>*)state);
}

TARGET static void join_spans(const Call& call, const Item& item, void* states) {
    item.columns > LANES ? join_all<2>(call, item, (char*)states) : join_all<1>(call, item, (char*)states);
}

static const Kernel kernel{2 * LANES, sizeof(State<2>), attend, attend_one_span, join_spans};

}  // namespace NAME

#undef NAME
#undef TARGET
#undef LANES
#undef PAIRS_OF_BF16
#undef TILES
