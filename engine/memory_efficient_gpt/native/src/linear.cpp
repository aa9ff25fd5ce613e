// y = x w^T + bias with row-major weights as torch stores them, for bfloat16 and float32.
//
// Method: dot products along K. A register tile of MR rows of x by NR rows of w keeps one vector of partial
// sums for each output, so weights are never repacked; x (small) is packed once for a call. Invariant: an
// output is the same chain of additions (chunks of K in order, then one fixed horizontal sum) whatever the
// tile, M, N or the thread count: a row computed in a batch equals the row computed alone, bit for bit.
//
// Letters: x [M, K], w [N, K], y [M, N]. A chunk is what one dot-product instruction takes from a row.

#include <algorithm>

#include "amx.h"
#include "parallel.h"
#include "simd.h"

namespace megpt {
namespace {

constexpr int kMaxRows = 6;                      // rows of x in a register tile
constexpr int kColumns = 4;                      // rows of w in a register tile
constexpr int64_t kBlockBytes = 192 * 1024;      // of weights that stay in L2 while all of x passes
constexpr int64_t kSpanBytes = 12288;             // of a row: four rows of w are to stay in an L1 of 32 or 48 KiB
constexpr int64_t kGroupBytes = 384 * 1024;      // of x that stay in L2

template <class E>
struct Chunk;

template <>
struct Chunk<float> {
    static constexpr int64_t size = W;
    using Vec = Vf;
    static Vec load(const float* p) { return megpt::load(p); }
    static Vf step(Vf sum, Vec a, Vec b) { return fma(a, b, sum); }
};

template <>
struct Chunk<bf16> {
    static constexpr int64_t size = 2 * W;
    using Vec = Bf16Chunk;
    static Vec load(const bf16* p) { return load_chunk(p); }
    static Vf step(Vf sum, Vec a, Vec b) { return dot_step(sum, a, b); }
};

template <class E>
typename Chunk<E>::Vec load_tail(const E* p, int64_t n) {
    E padded[Chunk<E>::size] = {};
    std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(E));
    return Chunk<E>::load(padded);
}

template <class E>
struct Problem {
    E* y;
    const E* x;
    const E* w;
    const E* bias;  // [N] or null
    int64_t M, N, K, x_stride, y_stride;
    int64_t chunks;     // of a row of K, the last one padded with zeros
    int64_t panels;     // of up to kMaxRows rows of x, as even as can be
    E* packed;          // [panel][chunk][row][Chunk::size]

    int64_t panel_start(int64_t panel) const { return panel * M / panels; }
};

// One panel of x, chunk by chunk, so that the inner loop reads it from the first byte to the last.
template <class E>
void pack_panel(const Problem<E>& p, int64_t panel) {
    constexpr int64_t size = Chunk<E>::size;
    const int64_t first = p.panel_start(panel), rows = p.panel_start(panel + 1) - first;
    E* out = p.packed + first * p.chunks * size;
    for (int64_t c = 0; c < p.chunks; ++c) {
        const int64_t n = std::min(size, p.K - c * size);
        for (int64_t r = 0; r < rows; ++r, out += size) {
            std::memcpy(out, p.x + (first + r) * p.x_stride + c * size, static_cast<size_t>(n) * sizeof(E));
            std::memset(static_cast<void*>(out + n), 0, static_cast<size_t>(size - n) * sizeof(E));
        }
    }
}

// A register tile over the chunks begin..end of K.
struct Span {
    int64_t begin, end;
};

// What a tile needs besides its coordinates.
template <class E>
struct Tile {
    int64_t m0, n;       // y[m0 + 0..MR, n + 0..NR]
    const E* packed;     // this panel of x
    Vf* partial;         // the sums between two spans of K
    const E* next;       // `ahead` rows of w from here on are asked for while this tile computes
    int ahead;
};

// Horizontal sums of MR * NR vectors, then bias, rounding and the store.
template <class E, int MR, int NR>
void finish(const Problem<E>& p, const Tile<E>& t, const Vf* sums) {
    constexpr int count = MR * NR;
    alignas(64) float total[count + W] = {};
    int i = 0;
    for (; i + 16 <= count; i += 16) reduce_add16(sums + i, total + i);
    for (; i + 4 <= count; i += 4) reduce_add4(sums + i, total + i);
    for (; i < count; ++i) total[i] = reduce_add(sums[i]);
    if (p.bias)
        for (int m = 0; m < MR; ++m)
            for (int j = 0; j < NR; ++j) total[m * NR + j] += to_float(p.bias[t.n + j]);
    E held[count + W];
    for (int k = 0; k < count; k += W) store(held + k, load(total + k));
    for (int m = 0; m < MR; ++m)
        std::memcpy(p.y + (t.m0 + m) * p.y_stride + t.n, held + m * NR, NR * sizeof(E));
}

template <class E, int MR, int NR>
void compute(const Problem<E>& p, const Tile<E>& t, Span span) {
    using C = Chunk<E>;
    const E* w = p.w + t.n * p.K;
    const E* x = t.packed + span.begin * MR * C::size;
    Vf sum[MR * NR];
#pragma GCC unroll 24
    for (int i = 0; i < MR * NR; ++i) sum[i] = span.begin == 0 ? zero() : t.partial[i];
    typename C::Vec wv[NR];
    auto add_chunk = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
            const auto xv = C::load(x + m * C::size);
#pragma GCC unroll 8
            for (int j = 0; j < NR; ++j) sum[m * NR + j] = C::step(sum[m * NR + j], xv, wv[j]);
        }
        x += MR * C::size;
    };
    const int64_t whole = std::min(span.end, p.K / C::size);
    for (int64_t c = span.begin; c < whole; ++c) {
        for (int r = 0; r < t.ahead; ++r)
            __builtin_prefetch(reinterpret_cast<const char*>(t.next + r * p.K + (c - span.begin) * C::size), 0, 3);
#pragma GCC unroll 8
        for (int j = 0; j < NR; ++j) wv[j] = C::load(w + j * p.K + c * C::size);
        add_chunk();
    }
    if (whole < span.end) {
        for (int j = 0; j < NR; ++j)
            wv[j] = load_tail<E>(w + j * p.K + whole * C::size, p.K - whole * C::size);
        add_chunk();
    }
    if (span.end == p.chunks) return finish<E, MR, NR>(p, t, sum);
#pragma GCC unroll 24
    for (int i = 0; i < MR * NR; ++i) t.partial[i] = sum[i];
}

template <class E, int NR>
void compute_rows(int64_t rows, const Problem<E>& p, const Tile<E>& t, Span span) {
    switch (rows) {
        case 1: return compute<E, 1, NR>(p, t, span);
        case 2: return compute<E, 2, NR>(p, t, span);
        case 3: return compute<E, 3, NR>(p, t, span);
        case 4: return compute<E, 4, NR>(p, t, span);
        case 5: return compute<E, 5, NR>(p, t, span);
        default: return compute<E, 6, NR>(p, t, span);
    }
}

// Rows n0..n1 of w in tiles of kColumns, and single rows at the end of N.
struct Columns {
    int64_t n0, n1;
    int64_t count() const { return (n1 - n0) / kColumns + (n1 - n0) % kColumns; }
    int64_t start(int64_t tile) const {
        const int64_t whole = (n1 - n0) / kColumns;
        return n0 + std::min(tile, whole) * kColumns + std::max<int64_t>(tile - whole, 0);
    }
};

// Some rows of w against all of x. A tile of w comes from memory once and stays in L1 while the panels of a
// group pass from L2; each of them asks for a part of the tile to come.
template <class E>
class Block {
public:
    Block(const Problem<E>& p, Columns columns) : p_(p), columns_(columns) {
        const int64_t row_bytes = p.chunks * Chunk<E>::size * static_cast<int64_t>(sizeof(E));
        span_ = ceil_div(p.chunks, ceil_div(row_bytes, kSpanBytes));
        group_ = std::max<int64_t>(kGroupBytes / (row_bytes * kMaxRows), 1);
        group_ = ceil_div(p.panels, ceil_div(p.panels, group_));
        static thread_local Scratch scratch;
        partial_ = static_cast<Vf*>(scratch.reserve(static_cast<size_t>(group_ * kTile) * sizeof(Vf)));
    }

    void run() const {
        for (int64_t first = 0; first < p_.panels; first += group_) {
            const int64_t end = std::min(first + group_, p_.panels);
            for (int64_t i = 0; i < columns_.count(); ++i)
                for (int64_t c = 0; c < p_.chunks; c += span_) pass(i, Span{c, std::min(c + span_, p_.chunks)}, first, end);
        }
    }

private:
    static constexpr int64_t kTile = kMaxRows * kColumns;

    // One tile of w, one span of K, panels first..end of x.
    void pass(int64_t column, Span span, int64_t first, int64_t end) const {
        const int64_t n = columns_.start(column);
        // What comes next through L1: the same rows' next span, or the next tile's first.
        const bool last = span.end == p_.chunks;
        const int64_t after = last ? columns_.start(column + 1) : n;
        const E* next = p_.w + after * p_.K + (last ? 0 : span.end * Chunk<E>::size);
        const int ahead = static_cast<int>(ceil_div(kColumns, end - first));
        for (int64_t panel = first; panel < end; ++panel) {
            const int64_t m0 = p_.panel_start(panel), rows = p_.panel_start(panel + 1) - m0;
            const int64_t asked = (panel - first) * ahead;
            // A single panel passes once over w in order: the processor's own prefetching does that better.
            const bool ask = p_.panels > 1 && asked < kColumns && after + asked + ahead <= p_.N;
            const Tile<E> t{m0, n, p_.packed + m0 * p_.chunks * Chunk<E>::size, partial_ + (panel - first) * kTile,
                            next + asked * p_.K, ask ? ahead : 0};
            if (n + kColumns <= columns_.n1)
                compute_rows<E, kColumns>(rows, p_, t, span);
            else
                compute_rows<E, 1>(rows, p_, t, span);
        }
    }

    const Problem<E>& p_;
    Columns columns_;
    int64_t span_;   // chunks of K that go through L1 at a time
    int64_t group_;  // panels of x that stay in L2 together
    Vf* partial_;
};

template <class E>
void linear(Problem<E> p, int64_t threads) {
    static thread_local Scratch scratch;
    if (p.M == 0 || p.N == 0) return;
    p.chunks = std::max<int64_t>(ceil_div(p.K, Chunk<E>::size), 1);  // K = 0: one chunk of zeros
    p.panels = ceil_div(p.M, kMaxRows);
    p.packed = static_cast<E*>(scratch.reserve(static_cast<size_t>(p.M * p.chunks * Chunk<E>::size) * sizeof(E)));
    // One thread's pace: 400 (bfloat16) or 200 (float32) operations a nanosecond, 40 bytes of weights.
    const double bytes = static_cast<double>(p.N) * static_cast<double>(p.K) * sizeof(E);
    const int team = useful_threads(threads, std::max(bytes * static_cast<double>(p.M) / 400e3, bytes / 40e3));
    parallel_for(p.panels, p.panels >= 16 ? team : 1, [&](int64_t panel) { pack_panel(p, panel); });
    int64_t block = kBlockBytes / static_cast<int64_t>(sizeof(E)) / std::max<int64_t>(p.K, 1);
    block = std::min(block, ceil_div(p.N, 4 * team));
    block = std::max<int64_t>(round_up(block, kColumns), kColumns);
    parallel_for(ceil_div(p.N, block), team,
                 [&](int64_t i) {
                     Block<E>(p, Columns{i * block, std::min(p.N, (i + 1) * block)}).run();
                 });
}

template <class E>
void linear(void* y, const void* x, const void* w, const void* bias, int64_t M, int64_t N, int64_t K,
            int64_t x_stride, int64_t threads) {
    Problem<E> p{};
    p.y = static_cast<E*>(y);
    p.x = static_cast<const E*>(x);
    p.w = static_cast<const E*>(w);
    p.bias = static_cast<const E*>(bias);
    p.M = M;
    p.N = N;
    p.K = K;
    p.x_stride = x_stride;
    p.y_stride = N;
    linear(p, threads);
}

}  // namespace
}  // namespace megpt

// y [M, N] contiguous, x [M, K] with rows x_stride apart, w [N, K] contiguous, bias [N] or null: all float32
// or all bfloat16 (dtype); sums are float32.
MEGPT_EXPORT void megpt_linear(void* y, const void* x, const void* w, const void* bias, int64_t M, int64_t N,
                               int64_t K, int64_t x_stride, int64_t dtype, int64_t threads) {
    if (dtype == megpt::kBFloat16)
        megpt::linear<megpt::bf16>(y, x, w, bias, M, N, K, x_stride, threads);
    else
        megpt::linear<float>(y, x, w, bias, M, N, K, x_stride, threads);
}

MEGPT_EXPORT const char* megpt_isa(void) { return megpt::instruction_set(); }
