// One tile of 64 keys against a block of rows: pack, score, softmax, accumulate.
//
// Letters as in attention.cpp. Scores and sums are float32. A word is 32 bits: one float (FloatMath) or two
// bfloat16 for the bf16 dot-product instruction (PairMath).
#pragma once

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace megpt {
namespace {

constexpr int64_t kTileKeys = 64;
constexpr int64_t kRowBlock = 48;
constexpr int kRowGroup = 6;  // rows of a register tile

struct Cache {
    const void *keys, *values;               // [N, BS, Hkv, Dk], [N, BS, Hkv, Dv]
    const float *key_scales, *value_scales;  // [N, BS, Hkv], int8 only
    int64_t Hkv, Dk, Dv, BS;
    int64_t dtype;
};

struct Mathematics {
    float scale, softcap;  // softcap 0: none
    int64_t window;        // 0: none
    bool alibi;
};

// Key positions that a row sees: begin <= k < end; end - 1 is its own position.
struct KeyRange {
    int64_t begin, end;
};

struct RowBlock {
    int64_t count;
    KeyRange range[kRowBlock];
};

inline float exp1(float x) {
    float lanes[W];
    store(lanes, exp(set1(x)));
    return lanes[0];
}

// The softmax of some keys, unfinished: m the largest score, l the sum of exp(score - m), acc that of
// exp(score - m) * value.
struct State {
    int64_t stride;  // of acc's rows: Dv rounded up to whole vectors
    float *m, *l, *acc;

    static int64_t floats(int64_t rows, int64_t Dv) { return rows * round_up(Dv, W) + round_up(2 * rows, 16); }

    State(float* memory, int64_t rows, int64_t Dv)
        : stride(round_up(Dv, W)), m(memory), l(m + rows), acc(m + round_up(2 * rows, 16)) {}

    void clear(int64_t rows) const {
        std::fill(m, m + rows, -INFINITY);
        std::fill(l, l + rows, 0.0f);
        std::fill(acc, acc + rows * stride, 0.0f);
    }

    // Add the softmax of later keys.
    void join(const State& later, int64_t rows) const {
        for (int64_t r = 0; r < rows; ++r) {
            if (later.l[r] == 0.0f) continue;
            const float top = std::max(m[r], later.m[r]);
            const float mine = exp1(m[r] - top), theirs = exp1(later.m[r] - top);
            m[r] = top;
            l[r] = l[r] * mine + later.l[r] * theirs;
            for (int64_t d = 0; d < stride; d += W) {
                const Vf sum = mul(load(acc + r * stride + d), set1(mine));
                store(acc + r * stride + d, fma(load(later.acc + r * stride + d), set1(theirs), sum));
            }
        }
    }
};

// A thread's working memory for one tile.
struct TileMemory {
    float* query;   // [heads][rows][words of Dk]
    float* keys;    // [words of Dk][kTileKeys]: transposed, so that a vector holds one word of W keys
    float* values;  // [words of kTileKeys][stride]
    float* scores;  // [rows][kTileKeys], then the probabilities

    static TileMemory on_this_thread(int64_t rows, int64_t heads, int64_t words, int64_t stride) {
        static thread_local Scratch scratch;
        const int64_t query = round_up(rows * heads * words, 16), keys = words * kTileKeys;
        const int64_t values = kTileKeys * stride, scores = rows * kTileKeys;
        auto* p = static_cast<float*>(scratch.reserve(static_cast<size_t>(query + keys + values + scores) * sizeof(float)));
        return {p, p + query, p + query + keys, p + query + keys + values};
    }
};

// Where the keys first..count-1 of a tile are; the rows see no others.
struct TileSlots {
    int64_t first = 0, count = 0;
    int64_t slot[kTileKeys];  // block * BS + offset

    TileSlots() = default;
    TileSlots(const Cache& c, const int32_t* table, int64_t begin, int64_t start, int64_t end)
        : first(std::max<int64_t>(begin - start, 0)), count(std::min(kTileKeys, end - start)) {
        int64_t block = (start + first) / c.BS, offset = (start + first) % c.BS;
        for (int64_t j = first; j < count; ++j) {
            slot[j] = table[block] * c.BS + offset;
            if (++offset == c.BS) {
                offset = 0;
                ++block;
            }
        }
    }

    // Read part `part` of `parts` of the rows of `heads` heads, one byte of each line in the order of memory:
    // real loads in order start the hardware's prefetchers, which fetch more at once than prefetch hints do
    // (measured: a third less time).
    void touch(const void* cache, int64_t row_bytes, int64_t head_bytes, int64_t heads, int64_t part,
               int64_t parts) const {
        const int64_t seen = count - first;
        for (int64_t j = first + part * seen / parts; j < first + (part + 1) * seen / parts; ++j) {
            const char* row = static_cast<const char*>(cache) + slot[j] * row_bytes;
            for (int64_t at = 0; at < heads * head_bytes; at += 64) {
                const char loaded = *static_cast<const volatile char*>(row + at);
                (void)loaded;
            }
        }
    }
};

// One head's keys or values of a tile.
template <class KT>
struct TileRows {
    const TileSlots& slots;
    const KT* base;  // slot 0, this head
    int64_t stride;  // elements from slot to slot

    // Null where the rows see nothing.
    const KT* row(int64_t j) const {
        return j >= slots.first && j < slots.count ? base + slots.slot[j] * stride : nullptr;
    }
};

// A word is a float.
struct FloatMath {
    static constexpr int64_t kPerWord = 1;

    static Vf step(Vf sum, Vf a, Vf b) { return fma(a, b, sum); }

    template <class T>
    static void pack_query(float* out, const T* row, int64_t D) {
        for (int64_t d = 0; d < D; ++d) out[d] = to_float(row[d]);
    }
    // W words of a key's row from element d on; zero beyond D.
    template <class KT>
    static Vf key_words(const KT* row, int64_t d, int64_t D) {
        return d + W <= D ? load(row + d) : load_n(row + d, D - d);
    }
    template <class KT>
    static void pack_values(float* out, int64_t stride, const TileRows<KT>& values, int64_t columns, int64_t D) {
        for (int64_t j = 0; j < columns; ++j, out += stride) {
            const KT* row = values.row(j);
            for (int64_t d = 0; d < stride; d += W)
                store(out + d, row ? key_words(row, d, D) : zero());
        }
    }
    static void store_probabilities(float* out, Vf p) { store(out, p); }
};

#if defined(MEGPT_BF16_DOT)
// A word is two bfloat16: elements 2i and 2i + 1 of a row, or the values of keys 2i and 2i + 1.
struct PairMath {
    static constexpr int64_t kPerWord = 2;

    static Vf step(Vf sum, Vf a, Vf b) { return dot_step(sum, _mm512_castps_si512(a), _mm512_castps_si512(b)); }

    template <class T>
    static void pack_query(float* out, const T* row, int64_t D) {
        auto* elements = reinterpret_cast<char*>(out);
        for (int64_t d = 0; d < round_up(D, 2); ++d) {
            const bf16 x = to_bf16(d < D ? to_float(row[d]) : 0.0f);
            std::memcpy(elements + d * static_cast<int64_t>(sizeof x), &x, sizeof x);
        }
    }
    static __m512i widen(const bf16* p) { return _mm512_loadu_si512(p); }
    // Whole numbers up to 127 are exact in bfloat16.
    static __m512i widen(const int8_t* p) {
        const __m256i low = _mm512_cvtepi32_epi16(bf16_bits(load(p)));
        const __m256i high = _mm512_cvtepi32_epi16(bf16_bits(load(p + W)));
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    template <class KT>
    static __m512i elements(const KT* row, int64_t d, int64_t D) {
        if (d + 2 * W <= D) return widen(row + d);
        KT padded[2 * W] = {};
        std::memcpy(padded, row + d, static_cast<size_t>(std::max<int64_t>(D - d, 0)) * sizeof(KT));
        return widen(padded);
    }
    template <class KT>
    static Vf key_words(const KT* row, int64_t word, int64_t D) {
        return _mm512_castsi512_ps(elements(row, 2 * word, D));
    }
    template <class KT>
    static void pack_values(float* out, int64_t stride, const TileRows<KT>& values, int64_t columns, int64_t D) {
        const __m512i zeros = _mm512_setzero_si512();
        // Lanes of `even` and `odd` interleaved: pairs 0..15, then 16..31.
        const __m512i first = interleaving(0), second = interleaving(16);
        for (int64_t j = 0; j < columns; j += 2, out += stride) {
            const KT *a = values.row(j), *b = values.row(j + 1);
            for (int64_t d = 0; d < stride; d += 2 * W) {
                const __m512i even = a ? elements(a, d, D) : zeros, odd = b ? elements(b, d, D) : zeros;
                _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(even, first, odd));
                if (d + W < stride) _mm512_storeu_si512(out + d + W, _mm512_permutex2var_epi16(even, second, odd));
            }
        }
    }
    static __m512i interleaving(int from) {
        alignas(64) uint16_t lanes[2 * W];
        for (int i = 0; i < W; ++i) {
            lanes[2 * i] = static_cast<uint16_t>(from + i);
            lanes[2 * i + 1] = static_cast<uint16_t>(32 + from + i);
        }
        return _mm512_load_si512(lanes);
    }
    static void store_probabilities(float* out, Vf p) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(p)));
    }
};
#endif

template <class Math, class KT>
void pack_keys(float* out, const TileRows<KT>& keys, int64_t columns, int64_t D) {
    const int64_t words = ceil_div(D, Math::kPerWord);
    for (int64_t j = 0; j < columns; j += W) {
        const KT* row[W];
        for (int i = 0; i < W; ++i) row[i] = keys.row(j + i);
        for (int64_t word = 0; word < words; word += W) {
            Vf v[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) v[i] = row[i] ? Math::key_words(row[i], word, D) : zero();
            transpose(v);
            const int64_t n = std::min<int64_t>(W, words - word);
            for (int64_t i = 0; i < n; ++i) store(out + (word + i) * kTileKeys + j, v[i]);
        }
    }
}

// c[MR][NV * W] (+)= a[MR][steps] b[steps][NV * W], where an element of a is one word.
template <class Math, bool Add, int MR, int NV>
void multiply_tile(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t steps) {
    Vf sum[MR][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) sum[m][n] = Add ? load(c + m * ldc + n * W) : zero();
    for (int64_t k = 0; k < steps; ++k) {
        Vf bv[NV];
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) bv[n] = load(b + k * ldb + n * W);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
            const Vf av = set1(a[m * lda + k]);
#pragma GCC unroll 8
            for (int n = 0; n < NV; ++n) sum[m][n] = Math::step(sum[m][n], av, bv[n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) store(c + m * ldc + n * W, sum[m][n]);
}

template <class Math, bool Add, int NV>
void multiply_rows(int64_t rows, float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb,
                   int64_t steps) {
    switch (rows) {
        case 1: return multiply_tile<Math, Add, 1, NV>(c, ldc, a, lda, b, ldb, steps);
        case 2: return multiply_tile<Math, Add, 2, NV>(c, ldc, a, lda, b, ldb, steps);
        case 3: return multiply_tile<Math, Add, 3, NV>(c, ldc, a, lda, b, ldb, steps);
        case 4: return multiply_tile<Math, Add, 4, NV>(c, ldc, a, lda, b, ldb, steps);
        case 5: return multiply_tile<Math, Add, 5, NV>(c, ldc, a, lda, b, ldb, steps);
        default: return multiply_tile<Math, Add, 6, NV>(c, ldc, a, lda, b, ldb, steps);
    }
}

// c[rows][columns] (+)= a[rows][steps] b[steps][columns]; columns is a multiple of W.
template <class Math, bool Add>
void multiply(int64_t rows, int64_t columns, float* c, int64_t ldc, const float* a, int64_t lda, const float* b,
              int64_t ldb, int64_t steps) {
    for (int64_t r = 0; r < rows; r += kRowGroup) {
        const int64_t n = std::min<int64_t>(kRowGroup, rows - r);
        int64_t j = 0;
        for (; j + kColumnVectors * W <= columns; j += kColumnVectors * W)
            multiply_rows<Math, Add, kColumnVectors>(n, c + r * ldc + j, ldc, a + r * lda, lda, b + j, ldb, steps);
        for (; j < columns; j += W)
            multiply_rows<Math, Add, 1>(n, c + r * ldc + j, ldc, a + r * lda, lda, b + j, ldb, steps);
    }
}

// What turns one head's scores into probabilities.
struct HeadScales {
    alignas(64) float key[kTileKeys], value[kTileKeys];  // int8 only, zero where the rows see nothing

    void load_from(const Cache& c, const TileSlots& slots, int64_t head) {
        std::fill(key, key + kTileKeys, 0.0f);
        std::fill(value, value + kTileKeys, 0.0f);
        for (int64_t j = slots.first; j < slots.count; ++j) {
            key[j] = c.key_scales[slots.slot[j] * c.Hkv + head];
            value[j] = c.value_scales[slots.slot[j] * c.Hkv + head];
        }
    }
};

// Scores of one row become probabilities in place; the row's sums so far are brought to the new maximum.
// lo..hi: the tile's keys that the row sees; distance: of the tile's first key from the row's position.
template <class Math, bool Quantized>
void softmax_row(const Mathematics& maths, int64_t lo, int64_t hi, float distance, float slope,
                 const HeadScales& scales, int64_t columns, float* scores, int64_t r, const State& state) {
    if (hi <= lo) {
        std::fill(scores, scores + columns, 0.0f);
        return;
    }
    const bool masked = lo > 0 || hi < columns;
    Vf top = set1(-INFINITY);
    for (int64_t j = 0; j < columns; j += W) {
        Vf x = mul(load(scores + j), set1(maths.scale));
        const Vf lane = add(lane_index(), set1(static_cast<float>(j)));
        if constexpr (Quantized) x = mul(x, load(scales.key + j));
        if (maths.softcap > 0.0f) x = mul(tanh(div(x, set1(maths.softcap))), set1(maths.softcap));
        if (maths.alibi) x = fma(set1(slope), add(lane, set1(distance)), x);
        if (masked) {
            const Vf none = set1(-INFINITY);
            x = select(less(lane, set1(static_cast<float>(lo))), none, x);
            x = select(less(lane, set1(static_cast<float>(hi))), x, none);
        }
        top = max(top, x);
        store(scores + j, x);
    }
    const float m = std::max(state.m[r], reduce_max(top));
    const float kept = exp1(state.m[r] - m);
    Vf sum = zero();
    for (int64_t j = 0; j < columns; j += W) {
        Vf p = exp(sub(load(scores + j), set1(m)));
        sum = add(sum, p);
        if constexpr (Quantized) p = mul(p, load(scales.value + j));
        Math::store_probabilities(scores + j / Math::kPerWord, p);
    }
    state.m[r] = m;
    state.l[r] = state.l[r] * kept + reduce_add(sum);
    if (kept == 1.0f) return;
    float* acc = state.acc + r * state.stride;
    for (int64_t d = 0; d < state.stride; d += W) store(acc + d, mul(load(acc + d), set1(kept)));
}

// One head. `slope(r)` is the row's ALiBi slope.
template <class Math, class KT, class Slope>
void attend_tile(const Mathematics& maths, const Cache& cache, const RowBlock& rows, const TileSlots& slots,
                 int64_t head, int64_t start, const Slope& slope, const TileMemory& memory, const float* query,
                 const State& state) {
    const int64_t columns = round_up(slots.count, std::max<int64_t>(W, 2));
    const int64_t words = ceil_div(cache.Dk, Math::kPerWord);
    const auto* keys = static_cast<const KT*>(cache.keys) + head * cache.Dk;
    const auto* values = static_cast<const KT*>(cache.values) + head * cache.Dv;
    pack_keys<Math>(memory.keys, TileRows<KT>{slots, keys, cache.Hkv * cache.Dk}, columns, cache.Dk);
    Math::pack_values(memory.values, state.stride, TileRows<KT>{slots, values, cache.Hkv * cache.Dv}, columns, cache.Dv);
    constexpr bool quantized = sizeof(KT) == 1;
    HeadScales scales;
    if constexpr (quantized) scales.load_from(cache, slots, head);
    multiply<Math, false>(rows.count, columns, memory.scores, kTileKeys, query, words, memory.keys, kTileKeys, words);
    for (int64_t r = 0; r < rows.count; ++r) {
        const KeyRange range = rows.range[r];
        softmax_row<Math, quantized>(maths, std::max<int64_t>(range.begin - start, 0),
                                     std::min(range.end - start, slots.count), static_cast<float>(start - range.end + 1),
                                     slope(r), scales, columns, memory.scores + r * kTileKeys, r, state);
    }
    multiply<Math, true>(rows.count, state.stride, state.acc, state.stride, memory.scores, kTileKeys, memory.values,
                         state.stride, columns / Math::kPerWord);
}

}  // namespace
}  // namespace megpt
