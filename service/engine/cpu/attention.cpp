// Attention over a paged KV cache of bf16, summed in fp32: what decode and prefill have in common.
//
// Flash attention (Dao et al. 2022) with the running softmax of Milakov & Gimelshein (2018), on the transposed
// product: S^T = K Q^T and O^T += V^T P^T. A column is one query head of one token; columns are the lanes of a
// vector, so the softmax needs no sum across lanes, and K [keys][dims] and V^T [dims][keys] are read as they lie.
//
// A column's result does not depend on what else is computed with it: keys are taken in fixed rounds, counted
// from the first token of the sequence, and a key that a column does not see adds exactly nothing to it.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "common.h"

namespace {

constexpr int BLOCK = 32;       // tokens in a block of the pool
constexpr int ROUND = 8;        // blocks between two updates of the running softmax
constexpr int SPAN = 1024;      // keys in a part that has a running softmax of its own; parts may run at once
constexpr int MAX_HEAD = 256;   // the largest head_dim
constexpr size_t STATES = 16 << 20;  // bytes of all states of a call, at most; the plan leaves room for them

struct Call {
    const bf16 *q, *k_pool, *v_pool;
    int64_t q_stride, q_head_stride;
    const int32_t* tables;
    int64_t table_stride;
    const int32_t *cu_seqlens, *starts;
    int64_t heads, kv_heads, head_dim, window;
    float scale, softcap;
    bf16* out;
    int64_t out_stride;

    int64_t share() const { return heads / kv_heads; }  // query heads to a KV head
    int64_t length(int64_t sequence) const { return starts[sequence] + cu_seqlens[sequence + 1] - cu_seqlens[sequence]; }
    int64_t block_at(int64_t sequence, int64_t kv_head, int64_t block) const {  // offset in either pool
        return (tables[sequence * table_stride + block] * kv_heads + kv_head) * BLOCK * head_dim;
    }
};

// Some columns of one sequence and KV head: column c is head c % share of token c / share of this step.
struct Item {
    int64_t sequence, kv_head, column, columns;
    int64_t first, last;  // keys that any column sees: first <= key < last

    int64_t first_span() const { return first / SPAN; }
    int64_t spans() const { return (last + SPAN - 1) / SPAN - first_span(); }
};

// The token of a column, and the keys it sees.
struct Column {
    int64_t token, head, first, last;
    Column(const Call& call, const Item& item, int64_t index) {
        token = call.cu_seqlens[item.sequence] + index / call.share();
        head = item.kv_head * call.share() + index % call.share();
        last = call.starts[item.sequence] + index / call.share() + 1;
        first = call.window ? std::max<int64_t>(0, last - call.window) : 0;
    }
};

const bf16* query_of(const Call& call, const Item& item, int64_t index) {
    const Column column(call, item, item.column + index);
    return call.q + column.token * call.q_stride + column.head * call.q_head_stride;
}

// One instruction set's code. States are what a span leaves: the running softmax of its columns.
struct Kernel {
    int64_t columns;  // in an item, at most
    size_t state_bytes;
    void (*attend)(const Call&, const Item&);                            // all of an item
    void (*attend_span)(const Call&, const Item&, int64_t, void* state);  // or one of its spans ...
    void (*join_spans)(const Call&, const Item&, void* states);           // ... and in the end all of them
};

}  // namespace

#define NAME scalar
#define TARGET
#define LANES 4
#include "attention_core.h"

#if defined(__aarch64__)
#define NAME neon
#define TARGET
#define LANES 4
#include "attention_core.h"
#endif

#if defined(__x86_64__)
#define NAME avx2
#define TARGET TARGET_AVX2
#define LANES 8
#include "attention_core.h"

#define NAME avx512
#define TARGET TARGET_AVX512
#define LANES 16
#include "attention_core.h"

#define NAME avx512_bf16
#define TARGET TARGET_AVX512_BF16
#define LANES 16
#define PAIRS_OF_BF16
#include "attention_core.h"

#define NAME amx
#define TARGET TARGET_AMX
#define LANES 16
#define PAIRS_OF_BF16
#define TILES
#include "attention_core.h"
#endif

namespace {

const Kernel& kernel() {
#if defined(__x86_64__)
    if (isa == AMX) return amx::kernel;
    if (isa == AVX512_BF16) return avx512_bf16::kernel;
    if (isa == AVX512) return avx512::kernel;
    if (isa == AVX2) return avx2::kernel;
#elif defined(__aarch64__)
    if (isa == NEON) return neon::kernel;
#endif
    return scalar::kernel;
}

// All there is to do, the longest first, so that no thread is left with a long one at the end.
std::vector<Item> items_of(const Call& call, int64_t sequences, int64_t columns) {
    std::vector<Item> items;
    for (int64_t s = 0; s < sequences; ++s) {
        const int64_t all = (call.cu_seqlens[s + 1] - call.cu_seqlens[s]) * call.share();
        for (int64_t c = 0; c < all; c += columns) {
            for (int64_t h = 0; h < call.kv_heads; ++h) {
                Item item{s, h, c, std::min(columns, all - c), 0, 0};
                item.first = Column(call, item, c).first;
                item.last = Column(call, item, c + item.columns - 1).last;
                items.push_back(item);
            }
        }
    }
    std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
        return a.last - a.first > b.last - b.first;
    });
    return items;
}

// Fewer items than threads: their spans run at once, with the same arithmetic. False: there is no memory for that.
bool attend_split(const Call& call, const std::vector<Item>& items, const Kernel& kernel) {
    std::vector<std::pair<const Item*, int64_t>> spans;
    std::vector<int64_t> states_of;
    for (const Item& item : items) {
        states_of.push_back(int64_t(spans.size()));
        for (int64_t i = 0; i < item.spans(); ++i) spans.emplace_back(&item, item.first_span() + i);
    }
    const size_t bytes = spans.size() * kernel.state_bytes;
    std::unique_ptr<char, void (*)(void*)> states(
        bytes > STATES ? nullptr : static_cast<char*>(std::aligned_alloc(64, bytes)), std::free);
    if (!states) return false;
    parallel_for(int64_t(spans.size()), [&](int64_t i) {
        kernel.attend_span(call, *spans[i].first, spans[i].second, states.get() + i * kernel.state_bytes);
    });
    parallel_for(int64_t(items.size()), [&](int64_t i) {
        kernel.join_spans(call, items[i], states.get() + states_of[i] * kernel.state_bytes);
    });
    return true;
}

}  // namespace

// Keys and values of new tokens into their blocks. k, v: [tokens][kv_heads][head_dim] with strides in elements;
// slots[token] = block * 32 + place. K pool: [blocks][kv_heads][32][head_dim]; V pool: [blocks][kv_heads][head_dim][32].
extern "C" void snug_store_kv(const bf16* k, int64_t k_stride, int64_t k_head_stride, const bf16* v, int64_t v_stride,
                              int64_t v_head_stride, const int64_t* slots, int64_t tokens, int64_t kv_heads,
                              int64_t head_dim, bf16* k_pool, bf16* v_pool) {
    const auto store = [=](int64_t begin, int64_t end) {  // at most BLOCK tokens, which mostly share a block
        for (int64_t h = 0; h < kv_heads; ++h) {
            bf16* places[BLOCK];
            for (int64_t t = begin; t < end; ++t) {
                const int64_t place = slots[t] % BLOCK, at = (slots[t] / BLOCK * kv_heads + h) * BLOCK * head_dim;
                memcpy(k_pool + at + place * head_dim, k + t * k_stride + h * k_head_stride, 2 * head_dim);
                places[t - begin] = v_pool + at + place;
            }
            const bf16* from = v + begin * v_stride + h * v_head_stride;
            for (int64_t d = 0; d < head_dim; ++d) {
                for (int64_t t = 0; t < end - begin; ++t) places[t][d * BLOCK] = from[t * v_stride + d];
            }
        }
    };
    const int64_t parts = (tokens + BLOCK - 1) / BLOCK;  // a few tokens are not worth waking a thread
    parallel_for(parts, [&](int64_t i) { store(i * BLOCK, std::min(tokens, (i + 1) * BLOCK)); });
}

// q: [tokens][heads][head_dim] with strides in elements; out: [tokens][heads * head_dim], out_stride between tokens.
// Tokens cu_seqlens[s] .. cu_seqlens[s + 1] are sequence s's, at places starts[s] ... of it; their own keys and
// values are in the pools already. Token t of s lies in block tables[s * table_stride + t / 32], place t % 32.
// head_dim: a multiple of 32, at most 256. window 0: none, else a token sees the last `window` tokens, itself among
// them; blocks that none of them lies in are not read. softcap 0: none, else softcap * tanh(score / softcap).
extern "C" void snug_attention(const bf16* q, int64_t q_stride, int64_t q_head_stride, const bf16* k_pool,
                               const bf16* v_pool, const int32_t* tables, int64_t table_stride,
                               const int32_t* cu_seqlens, const int32_t* starts, int64_t sequences, int64_t heads,
                               int64_t kv_heads, int64_t head_dim, float scale, int64_t window, float softcap, bf16* out,
                               int64_t out_stride) {
    const Call call{q, k_pool, v_pool, q_stride, q_head_stride, tables, table_stride, cu_seqlens, starts,
                    heads, kv_heads, head_dim, window, scale, softcap, out, out_stride};
    const Kernel& code = kernel();
    const std::vector<Item> items = items_of(call, sequences, code.columns);
    if (items.empty()) return;
    if (int64_t(items.size()) < n_threads && items[0].spans() > 1 && attend_split(call, items, code)) return;
    parallel_for(int64_t(items.size()), [&](int64_t i) { code.attend(call, items[i]); });
}
