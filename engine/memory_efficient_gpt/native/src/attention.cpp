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
constexpr double kThreadWork = 400e3;  // multiplications worth waking a thread for

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

// Up to kRowBlock rows of one sequence and one KV head.
struct Item {
    int32_t sequence, head;
    int64_t first_row, rows;
    int64_t first_split, splits;  // the splits that any row sees
    int64_t unit;                 // number of splits of the items before
};

KeyRange range_of(const Problem& p, const Item& item, int64_t row) {
    const int64_t queries = p.query_starts[item.sequence + 1] - p.query_starts[item.sequence];
    const int64_t position = p.context_lens[item.sequence] - queries + (item.first_row + row) / p.group();
    const int64_t window = p.maths.window;
    return {window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0, position + 1};
}

// Longest rows first within a sequence, so that no thread is left with the heaviest item at the end.
void plan(const Problem& p, std::vector<Item>& items) {
    items.clear();
    int64_t unit = 0;
    for (int64_t s = 0; s < p.S; ++s) {
        const int64_t rows = (p.query_starts[s + 1] - p.query_starts[s]) * p.group();
        for (int64_t block = ceil_div(rows, kRowBlock) - 1; block >= 0; --block)
            for (int64_t h = 0; h < p.cache.Hkv; ++h) {
                Item item{static_cast<int32_t>(s), static_cast<int32_t>(h), block * kRowBlock,
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

const void* query_row(const Problem& p, const Item& item, int64_t row, int64_t element_bytes) {
    const int64_t r = item.first_row + row;
    const int64_t token = p.query_starts[item.sequence] + r / p.group();
    const int64_t head = item.head * p.group() + r % p.group();
    return static_cast<const char*>(p.query) +
           (token * p.query_stride_t + head * p.query_stride_h) * element_bytes;
}

// One split of one item, into `state`.
template <class Math, class KT>
void compute_split(const Problem& p, const Item& item, int64_t split, const State& state) {
    const int64_t Dk = p.cache.Dk, words = ceil_div(Dk, Math::kPerWord);
    TileMemory memory = TileMemory::on_this_thread(words, state.stride);
    RowBlock rows{};
    rows.count = item.rows;
    for (int64_t r = 0; r < item.rows; ++r) {
        rows.range[r] = range_of(p, item, r);
        const int64_t head = item.head * p.group() + (item.first_row + r) % p.group();
        rows.slope[r] = p.slopes ? p.slopes[head] : 0.0f;
        float* packed = memory.query + r * words;
        if (p.query_dtype == kBFloat16)
            Math::pack_query(packed, static_cast<const bf16*>(query_row(p, item, r, sizeof(bf16))), Dk);
        else
            Math::pack_query(packed, static_cast<const float*>(query_row(p, item, r, sizeof(float))), Dk);
    }
    state.clear(item.rows);
    const int64_t begin = std::max(rows.range[0].begin, split * kSplitKeys) / kTileKeys * kTileKeys;
    const int64_t end = std::min(rows.range[item.rows - 1].end, (split + 1) * kSplitKeys);
    const int32_t* table = p.block_tables + item.sequence * p.table_stride;
    const auto locate = [&](int64_t start) {
        return TileKeys<KT>(p.cache, table, item.head, std::max(start, rows.range[0].begin), start, end);
    };
    TileKeys<KT> keys = locate(begin);
    for (int64_t start = begin; start < end; start += kTileKeys) {
        const TileKeys<KT> next = start + kTileKeys < end ? locate(start + kTileKeys) : TileKeys<KT>();
        attend_tile<Math, KT>(p.maths, p.cache, rows, keys, next, start, memory, state);
        keys = next;
    }
}

// out = acc / l, after the sinks took their share of l; a row without keys gives zeros.
void finish(const Problem& p, const Item& item, const State& state) {
    for (int64_t r = 0; r < item.rows; ++r) {
        const int64_t row = item.first_row + r;
        const int64_t token = p.query_starts[item.sequence] + row / p.group();
        const int64_t head = item.head * p.group() + row % p.group();
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

// Every split of an item in turn, joined in order.
template <class Math, class KT>
void run_item(const Problem& p, const Item& item) {
    static thread_local Scratch scratch;
    const int64_t size = State::floats(p.Dv);
    float* memory = static_cast<float*>(scratch.reserve(static_cast<size_t>(2 * size) * sizeof(float)));
    const State total(memory, p.Dv);
    compute_split<Math, KT>(p, item, item.first_split, total);
    const State part(memory + size, p.Dv);
    for (int64_t i = 1; i < item.splits; ++i) {
        compute_split<Math, KT>(p, item, item.first_split + i, part);
        total.join(part, item.rows);
    }
    finish(p, item, total);
}

// Few items with long contexts: the splits are shared out too, then joined in the same order.
template <class Math, class KT>
void run_splits(const Problem& p, const std::vector<Item>& items, int threads) {
    static thread_local Scratch scratch;
    const int64_t size = State::floats(p.Dv), units = items.back().unit + items.back().splits;
    float* memory = static_cast<float*>(scratch.reserve(static_cast<size_t>(units * size) * sizeof(float)));
    parallel_for(units, threads, [&](int64_t unit) {
        const auto after = std::upper_bound(items.begin(), items.end(), unit,
                                            [](int64_t u, const Item& item) { return u < item.unit; });
        const Item& item = *(after - 1);
        compute_split<Math, KT>(p, item, item.first_split + unit - item.unit, State(memory + unit * size, p.Dv));
    });
    parallel_for(static_cast<int64_t>(items.size()), 1, [&](int64_t i) {
        const State total(memory + items[i].unit * size, p.Dv);
        for (int64_t k = 1; k < items[i].splits; ++k)
            total.join(State(memory + (items[i].unit + k) * size, p.Dv), items[i].rows);
        finish(p, items[i], total);
    });
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
    plan(p, items);
    if (items.empty()) return;
    double work = 0;
    for (const Item& item : items)
        work += static_cast<double>(item.rows + 4) * static_cast<double>(item.splits) *
                static_cast<double>(std::min<int64_t>(range_of(p, item, item.rows - 1).end, kSplitKeys)) *
                static_cast<double>(p.cache.Dk + p.Dv);
    const int team = useful_threads(threads, work, kThreadWork);
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
