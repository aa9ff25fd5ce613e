// Causal attention over a paged KV cache: decode, chunked prefill and both in one call.
//
// Method: online softmax over tiles of 64 keys (as FlashAttention; https://arxiv.org/abs/2205.14135). The
// query heads that share a KV head are rows of one small matrix product, so a tile of keys and values is
// packed once for up to 48 rows. Invariant: tiles and splits start at multiples of kTileKeys and kSplitKeys
// counted from position 0, and a row's arithmetic does not depend on the rows beside it: its result is the
// same, bit for bit, alone, in a batch, after any chunking of the prompt, and on any number of threads.
//
// Letters: T tokens, S sequences, Hq query heads, Hkv KV heads, G = Hq / Hkv, Dk and Dv head sizes, BS
// tokens of a block. A row is one query head of one token: row = token * G + head within the group.

#include <algorithm>
#include <vector>

#include "attention_tile.h"
#include "parallel.h"
#include "simd.h"

namespace megpt {
namespace {

constexpr int64_t kSplitKeys = 1024;   // keys whose softmax is summed before it joins the splits before it
constexpr int64_t kFewRows = 16;       // up to here an item may have several heads

struct Problem {
    void* out;                                             // [T, Hq, Dv]
    const void* query;                                     // [T, Hq, Dk], strides below
    Cache cache;
    const int32_t *block_tables, *query_starts, *context_lens;
    const float *sinks, *slopes;                           // [Hq] or null
    int64_t T, S, Hq, Dv, table_stride, query_stride_t, query_stride_h;
    int64_t query_dtype;
    Mathematics maths;

    int64_t group() const { return Hq / cache.Hkv; }
};

// Up to kRowBlock rows of one sequence for some neighbouring KV heads. Several heads only where rows are few:
// then memory sets the pace, and a token's heads lie side by side.
struct Item {
    int32_t sequence;
    int64_t head, heads;
    int64_t first_row, rows;      // of each head
    int64_t first_split, splits;  // the splits that any row sees
    int64_t unit;                 // number of splits of the items before
};

KeyRange range_of(const Problem& p, const Item& item, int64_t row) {
    const int64_t queries = p.query_starts[item.sequence + 1] - p.query_starts[item.sequence];
    const int64_t position = p.context_lens[item.sequence] - queries + (item.first_row + row) / p.group();
    const int64_t window = p.maths.window;
    return {window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0, position + 1};
}

// Heads of an item with few rows: all, or fewer to give every thread something to do.
int64_t heads_together(const Problem& p, int64_t threads) {
    int64_t heads = p.cache.Hkv;
    while (heads > 1 && p.S * ceil_div(p.cache.Hkv, heads) < 2 * threads) heads = ceil_div(heads, 2);
    return heads;
}

// Longest rows first within a sequence, so that no thread is left with the heaviest item at the end.
void plan(const Problem& p, int64_t threads, std::vector<Item>& items) {
    items.clear();
    const int64_t together = heads_together(p, threads);
    int64_t unit = 0;
    for (int64_t s = 0; s < p.S; ++s) {
        const int64_t rows = (p.query_starts[s + 1] - p.query_starts[s]) * p.group();
        const int64_t step = rows <= kFewRows ? together : 1;
        for (int64_t block = ceil_div(rows, kRowBlock) - 1; block >= 0; --block)
            for (int64_t h = 0; h < p.cache.Hkv; h += step) {
                Item item{static_cast<int32_t>(s), h, std::min(step, p.cache.Hkv - h), block * kRowBlock,
                          std::min<int64_t>(kRowBlock, rows - block * kRowBlock), 0, 0, unit};
                const int64_t begin = range_of(p, item, 0).begin;
                const int64_t end = range_of(p, item, item.rows - 1).end;
                item.first_split = begin / kSplitKeys;
                item.splits = std::max<int64_t>(ceil_div(end, kSplitKeys) - item.first_split, 1);
                unit += item.splits;
                items.push_back(item);
            }
    }
}

int64_t query_head(const Problem& p, const Item& item, int64_t h, int64_t row) {
    return (item.head + h) * p.group() + (item.first_row + row) % p.group();
}

int64_t query_token(const Problem& p, const Item& item, int64_t row) {
    return p.query_starts[item.sequence] + (item.first_row + row) / p.group();
}

template <class Math>
void pack_queries(const Problem& p, const Item& item, int64_t words, float* out) {
    for (int64_t h = 0; h < item.heads; ++h)
        for (int64_t r = 0; r < item.rows; ++r, out += words) {
            const int64_t at = query_token(p, item, r) * p.query_stride_t + query_head(p, item, h, r) * p.query_stride_h;
            if (p.query_dtype == kBFloat16)
                Math::pack_query(out, static_cast<const bf16*>(p.query) + at, p.cache.Dk);
            else
                Math::pack_query(out, static_cast<const float*>(p.query) + at, p.cache.Dk);
        }
}

// An item's states, head after head.
struct States {
    float* memory;
    int64_t rows, Dv;

    static int64_t floats(const Item& item, int64_t Dv) { return item.heads * State::floats(item.rows, Dv); }
    States(float* memory, const Item& item, int64_t Dv) : memory(memory), rows(item.rows), Dv(Dv) {}
    State of(int64_t h) const { return {memory + h * State::floats(rows, Dv), rows, Dv}; }
};

// One split of one item, into `states`.
template <class Math, class KT>
void compute_split(const Problem& p, const Item& item, int64_t split, const States& states) {
    const Cache& c = p.cache;
    const int64_t words = ceil_div(c.Dk, Math::kPerWord), heads = item.heads;
    const TileMemory memory = TileMemory::on_this_thread(item.rows, heads, words, round_up(c.Dv, W));
    pack_queries<Math>(p, item, words, memory.query);
    RowBlock rows{};
    rows.count = item.rows;
    for (int64_t r = 0; r < item.rows; ++r) rows.range[r] = range_of(p, item, r);
    for (int64_t h = 0; h < heads; ++h) states.of(h).clear(item.rows);
    const int64_t first = rows.range[0].begin;
    const int64_t begin = std::max(first, split * kSplitKeys) / kTileKeys * kTileKeys;
    const int64_t end = std::min(rows.range[item.rows - 1].end, (split + 1) * kSplitKeys);
    const int32_t* table = p.block_tables + item.sequence * p.table_stride;
    const auto locate = [&](int64_t start) {
        return start < end ? TileSlots(c, table, first, start, end) : TileSlots();
    };
    const auto* keys = static_cast<const KT*>(c.keys) + item.head * c.Dk;
    const auto* values = static_cast<const KT*>(c.values) + item.head * c.Dv;
    constexpr auto size = static_cast<int64_t>(sizeof(KT));
    TileSlots slots = locate(begin);
    for (int64_t start = begin; start < end; start += kTileKeys) {
        const TileSlots next = locate(start + kTileKeys);
        for (int64_t h = 0; h < heads; ++h) {
            next.touch(keys, c.Hkv * c.Dk * size, c.Dk * size, heads, h, heads);
            next.touch(values, c.Hkv * c.Dv * size, c.Dv * size, heads, h, heads);
            const auto slope = [&](int64_t r) { return p.slopes ? p.slopes[query_head(p, item, h, r)] : 0.0f; };
            attend_tile<Math, KT>(p.maths, c, rows, slots, item.head + h, start, slope, memory,
                                  memory.query + h * item.rows * words, states.of(h));
        }
        slots = next;
    }
}

// out = acc / l, after the sinks took their share of l; a row without keys gives zeros.
void finish_head(const Problem& p, const Item& item, int64_t h, const State& state) {
    for (int64_t r = 0; r < item.rows; ++r) {
        const int64_t token = query_token(p, item, r), head = query_head(p, item, h, r);
        float sum = state.l[r];
        const float* acc = state.acc + r * state.stride;
        Vf factor = set1(1.0f);
        if (p.sinks) {
            const float top = std::max(state.m[r], p.sinks[head]);
            const float kept = exp1(state.m[r] - top);
            sum = sum * kept + exp1(p.sinks[head] - top);
            factor = set1(kept);
        }
        const Vf divisor = set1(sum == 0.0f ? 1.0f : sum);
        const int64_t at = (token * p.Hq + head) * p.Dv;
        for (int64_t d = 0; d < p.Dv; d += W) {
            const Vf y = div(mul(load(acc + d), factor), divisor);
            const int64_t n = std::min<int64_t>(W, p.Dv - d);
            if (p.query_dtype == kBFloat16)
                store_n(static_cast<bf16*>(p.out) + at + d, y, n);
            else
                store_n(static_cast<float*>(p.out) + at + d, y, n);
        }
    }
}

void finish(const Problem& p, const Item& item, const States& states) {
    for (int64_t h = 0; h < item.heads; ++h) finish_head(p, item, h, states.of(h));
}

void join(const Item& item, const States& states, const States& later) {
    for (int64_t h = 0; h < item.heads; ++h) states.of(h).join(later.of(h), item.rows);
}

// Every split of an item in turn, joined in order.
template <class Math, class KT>
void run_item(const Problem& p, const Item& item) {
    static thread_local Scratch scratch;
    const int64_t size = States::floats(item, p.Dv);
    float* memory = static_cast<float*>(scratch.reserve(static_cast<size_t>(2 * size) * sizeof(float)));
    const States total(memory, item, p.Dv), part(memory + size, item, p.Dv);
    compute_split<Math, KT>(p, item, item.first_split, total);
    for (int64_t i = 1; i < item.splits; ++i) {
        compute_split<Math, KT>(p, item, item.first_split + i, part);
        join(item, total, part);
    }
    finish(p, item, total);
}

// Few items with long contexts: the splits are shared out too, then joined in the same order.
template <class Math, class KT>
void run_splits(const Problem& p, const std::vector<Item>& items, int threads) {
    static thread_local Scratch scratch;
    int64_t size = 0;
    for (const Item& item : items) size = std::max(size, States::floats(item, p.Dv));
    const int64_t units = items.back().unit + items.back().splits;
    float* memory = static_cast<float*>(scratch.reserve(static_cast<size_t>(units * size) * sizeof(float)));
    parallel_for(units, threads, [&](int64_t unit) {
        const auto after = std::upper_bound(items.begin(), items.end(), unit,
                                            [](int64_t u, const Item& item) { return u < item.unit; });
        const Item& item = *(after - 1);
        compute_split<Math, KT>(p, item, item.first_split + unit - item.unit, {memory + unit * size, item, p.Dv});
    });
    for (const Item& item : items) {
        const States total(memory + item.unit * size, item, p.Dv);
        for (int64_t k = 1; k < item.splits; ++k) join(item, total, {memory + (item.unit + k) * size, item, p.Dv});
        finish(p, item, total);
    }
}

// Padding: tokens before the first row's and after the last row's.
void clear_padding(const Problem& p) {
    const size_t token = static_cast<size_t>(p.Hq * p.Dv) * (p.query_dtype == kBFloat16 ? sizeof(bf16) : sizeof(float));
    const auto first = static_cast<size_t>(p.query_starts[0]), end = static_cast<size_t>(p.query_starts[p.S]);
    std::memset(p.out, 0, first * token);
    std::memset(static_cast<char*>(p.out) + end * token, 0, (static_cast<size_t>(p.T) - end) * token);
}

template <class Math, class KT>
void run(const Problem& p, int64_t threads) {
    static thread_local std::vector<Item> items;
    plan(p, threads, items);
    if (items.empty()) return;
    double work = 0;
    for (const Item& item : items)
        work += static_cast<double>((item.rows + 4) * item.heads * item.splits) *
                static_cast<double>(std::min<int64_t>(range_of(p, item, item.rows - 1).end, kSplitKeys)) *
                static_cast<double>(p.cache.Dk + p.Dv);
    const int team = useful_threads(threads, work / 40e3);  // measured: about 40 a nanosecond
    const auto count = static_cast<int64_t>(items.size());
    if (team > 1 && count < 2 * team && items.back().unit + items.back().splits > count)
        return run_splits<Math, KT>(p, items, team);
    const std::vector<Item>& shared = items;  // a thread_local name would mean each thread's own vector
    parallel_for(count, team, [&p, &shared](int64_t i) { run_item<Math, KT>(p, shared[i]); });
}

void dispatch(const Problem& p, int64_t threads) {
#if defined(MEGPT_BF16_DOT)
    if (p.query_dtype == kBFloat16) {
        if (p.cache.dtype == kBFloat16) return run<PairMath, bf16>(p, threads);
        if (p.cache.dtype == kInt8) return run<PairMath, int8_t>(p, threads);
    }
#endif
    switch (p.cache.dtype) {
        case kBFloat16: return run<FloatMath, bf16>(p, threads);
        case kInt8: return run<FloatMath, int8_t>(p, threads);
        default: return run<FloatMath, float>(p, threads);
    }
}

}  // namespace
}  // namespace megpt

// Integers of a call, in this order. Strides are in elements; window 0 and softcap 0 mean none.
struct MegptAttentionSizes {
    int64_t T, S, Hq, Hkv, Dk, Dv, BS, table_stride, query_stride_t, query_stride_h;
    int64_t query_dtype, cache_dtype, window, threads;
};

// out [T, Hq, Dv] in the query's type, zero for tokens of no row; the cache as kv_cache.cpp writes it; int32
// tables [S, table_stride], starts [S + 1] and lengths [S].
MEGPT_EXPORT void megpt_attention(void* out, const void* query, const void* keys, const void* values,
                                  const float* key_scales, const float* value_scales,
                                  const int32_t* block_tables, const int32_t* query_starts,
                                  const int32_t* context_lens, const float* sinks, const float* slopes,
                                  const MegptAttentionSizes* n, float scale, float softcap) {
    megpt::Problem p{};
    p.out = out;
    p.query = query;
    p.cache = {keys, values, key_scales, value_scales, n->Hkv, n->Dk, n->Dv, n->BS, n->cache_dtype};
    p.block_tables = block_tables;
    p.query_starts = query_starts;
    p.context_lens = context_lens;
    p.sinks = sinks;
    p.slopes = slopes;
    p.T = n->T;
    p.S = n->S;
    p.Hq = n->Hq;
    p.Dv = n->Dv;
    p.table_stride = n->table_stride;
    p.query_stride_t = n->query_stride_t;
    p.query_stride_h = n->query_stride_h;
    p.query_dtype = n->query_dtype;
    p.maths = {scale, softcap, n->window, slopes != nullptr};
    megpt::clear_padding(p);
    megpt::dispatch(p, n->threads);
}
