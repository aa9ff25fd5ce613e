// y = x w^T + bias with weights of 4 or 8 bits and activations rounded to 8 bits on the way in.
//
// Method: w = scale * (code - zero) over groups of inputs; x = step * q over spans of at most 128 inputs, q in
// -127..127. A span's dot product of codes and q is an exact integer; spans are added in order in float32.
// Sixteen outputs lie side by side in the lanes of a vector, so there are no horizontal sums. Invariant: an
// output is the same chain of operations whatever the tile, M, N or the thread count: a row computed in a
// batch equals the row computed alone, bit for bit.
//
// Letters: x [M, K], y [M, N]. A block is 16 outputs; a unit is 64 bytes of codes of a block.
//   4 bits: byte 4 r + j of unit v has row r's input 8 v + j in its low half, 8 v + 4 + j in its high half.
//   8 bits: byte 4 r + j of unit v has row r's input 4 v + j.

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "simd_int8.h"

extern "C" struct MegptQuantizedSizes {
    int64_t M, N, K;
    int64_t bits;      // 4 or 8
    int64_t span;      // inputs that share an activation step: a multiple of 8, at most 128
    int64_t spans;     // K / span, rounded up; codes are padded to spans * span inputs
    int64_t per_group; // spans that share a weight scale
    int64_t x_stride, dtype, threads;
};

namespace megpt {
namespace {

constexpr int kBlock = 16;                      // outputs of a block
constexpr int kVectors = kBlock / W;            // vectors of a block
constexpr int kUnit = 64;                       // bytes of a unit
#if defined(MEGPT_AVX512)
constexpr int kMaxRows = 12;                    // rows of x in a register tile
#else
constexpr int kMaxRows = 4;
#endif
constexpr int64_t kItemBytes = 256 * 1024;      // of codes that stay in L2 while all of x passes

// A panel's part of the rounded activations: [spans][span / 4][rows] of four bytes, and per span and row the
// step and the sum of q.
struct Panel {
    const int32_t* q;
    const float* step;
    const int32_t* sum;
};

struct Problem {
    void* y;
    const void* x;
    const uint8_t* codes;
    const uint16_t* scales;   // [blocks][groups][16] half
    const uint16_t* offsets;  // likewise, scale * zero; null: zero is the middle code
    const void* bias;         // [N] or null
    float unit;               // what all scales and offsets are multiplied by
    MegptQuantizedSizes s;
    int64_t panels, groups, block_bytes;
    int32_t* q;
    float* step;
    int32_t* sum;

    int64_t panel_start(int64_t panel) const { return panel * s.M / panels; }
    Panel panel(int64_t first_row) const {
        return {q + first_row * s.spans * s.span / 4, step + first_row * s.spans, sum + first_row * s.spans};
    }
};

// One row's span: q into `out`, returns the step; the sum of q into *sum. What is not finite gives NaN.
template <class E>
float round_span(const E* x, int64_t n, int64_t span, float unit, int8_t* out, int32_t* sum) {
    Vf largest = zero();
    Vf check = zero();  // stays 0 unless an element is NaN or infinite
    int64_t k = 0;
    for (; k + W <= n; k += W) {
        const Vf v = load(x + k);
        largest = max(largest, abs(v));
        check = fma(v, zero(), check);
    }
    float tail = reduce_max(largest), bad = reduce_add(check);
    for (; k < n; ++k) {
        const float v = to_float(x[k]);
        tail = std::max(tail, std::fabs(v));
        bad += v * 0.0f;
    }
    const float inverse = tail > 0x1p-120f ? 127.0f / tail : 0.0f;
    for (k = 0; k + W <= n; k += W) store(out + k, mul(load(x + k), set1(inverse)));
    if (k < n) store_n(out + k, mul(load_n(x + k, n - k), set1(inverse)), n - k);
    std::memset(out + n, 0, static_cast<size_t>(span - n));
    int32_t total = 0;
    for (int64_t i = 0; i < span; ++i) total += out[i];
    *sum = total;
    return tail / 127.0f * unit + bad;
}

template <class E>
void round_panel(const Problem& p, int64_t panel) {
    const int64_t first = p.panel_start(panel), rows = p.panel_start(panel + 1) - first;
    const int64_t words = p.s.span / 4;
    int32_t* q = p.q + first * p.s.spans * words;
    alignas(64) int8_t held[128];
    for (int64_t r = 0; r < rows; ++r) {
        const E* x = static_cast<const E*>(p.x) + (first + r) * p.s.x_stride;
        for (int64_t i = 0; i < p.s.spans; ++i) {
            const int64_t n = std::min(p.s.span, p.s.K - i * p.s.span), at = first * p.s.spans + i * rows + r;
            int8_t* out = rows == 1 ? reinterpret_cast<int8_t*>(q + i * words) : held;
            p.step[at] = round_span(x + i * p.s.span, n, p.s.span, p.unit, out, p.sum + at);
            if (rows == 1) continue;
            for (int64_t k = 0; k < words; ++k) std::memcpy(q + (i * words + k) * rows + r, held + 4 * k, 4);
        }
    }
}

template <class E>
void store_rows(const Problem& p, Vf value, int64_t row, int64_t column) {
    E* y = static_cast<E*>(p.y) + row * p.s.N + column;
    const int64_t n = std::min<int64_t>(p.s.N - column, W);
    if (n <= 0) return;
    if (p.bias != nullptr) {
        const E* bias = static_cast<const E*>(p.bias) + column;
        value = add(value, n == W ? load(bias) : load_n(bias, n));
    }
    if (n == W)
        store(y, value);
    else
        store_n(y, value, n);
}

// MR rows of x by one block of w.
template <class E, int BITS, int MR>
void tile(const Problem& p, int64_t first_row, int64_t block) {
    const Panel panel = p.panel(first_row);
    const int64_t units = p.s.span * BITS / 32;
    const bool symmetric = p.offsets == nullptr;
    for (int h = 0; h < kVectors; ++h) {
        const uint8_t* w = p.codes + block * p.block_bytes + h * W * 4;
        const int32_t* q = panel.q;
        Vf total[MR];
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) total[m] = zero();
        for (int64_t i = 0; i < p.s.spans; ++i) {
            const float* step = panel.step + i * MR;
            const int32_t* sum = panel.sum + i * MR;
            Vi acc[MR];
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m) acc[m] = splat(symmetric ? -(1 << (BITS - 1)) * sum[m] : 0);
            for (int64_t u = 0; u < units; ++u, w += kUnit) {
                __builtin_prefetch(w + 4096, 0, 3);
                const Vi codes = load_codes(w);
                if constexpr (BITS == 4) {
                    const Vi low = low_nibbles(codes), high = high_nibbles(codes);
#pragma GCC unroll 16
                    for (int m = 0; m < MR; ++m) acc[m] = dot_nibbles(acc[m], low, splat(q[m]));
#pragma GCC unroll 16
                    for (int m = 0; m < MR; ++m) acc[m] = dot_nibbles(acc[m], high, splat(q[MR + m]));
                    q += 2 * MR;
                } else {
#pragma GCC unroll 16
                    for (int m = 0; m < MR; ++m) acc[m] = dot_bytes(acc[m], codes, splat(q[m]));
                    q += MR;
                }
            }
            const int64_t at = (block * p.groups + i / p.s.per_group) * kBlock + h * W;
            const Vf scale = load_half(p.scales + at);
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m) total[m] = fma(mul(scale, set1(step[m])), to_float(acc[m]), total[m]);
            if (!symmetric) {
                const Vf offset = load_half(p.offsets + at);
#pragma GCC unroll 16
                for (int m = 0; m < MR; ++m)
                    total[m] = fma(offset, set1(-step[m] * static_cast<float>(sum[m])), total[m]);
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) store_rows<E>(p, total[m], first_row + m, block * kBlock + h * W);
    }
}

template <class E, int BITS, int MR = kMaxRows>
void tile_of(int64_t rows, const Problem& p, int64_t first_row, int64_t block) {
    if constexpr (MR > 1)
        if (rows < MR) return tile_of<E, BITS, MR - 1>(rows, p, first_row, block);
    tile<E, BITS, MR>(p, first_row, block);
}

template <class E, int BITS>
void multiply(Problem& p) {
    const int64_t blocks = ceil_div(p.s.N, kBlock);
    p.block_bytes = p.s.spans * p.s.span * kBlock * BITS / 8;
    const double bytes = static_cast<double>(blocks) * static_cast<double>(p.block_bytes);
    // One thread's pace: 200 products a nanosecond, 20 bytes of codes.
    const double work = bytes * 8 / BITS * static_cast<double>(p.s.M) / 200e3;
    const int team = useful_threads(p.s.threads, std::max(work, bytes / 20e3));
    parallel_for(p.panels, p.panels >= 8 ? team : 1, [&](int64_t panel) { round_panel<E>(p, panel); });
    int64_t step = std::max<int64_t>(kItemBytes / p.block_bytes, 1);
    step = std::min(step, ceil_div(blocks, 8 * team));
    parallel_for(ceil_div(blocks, step), team, [&](int64_t item) {
        const int64_t end = std::min(blocks, (item + 1) * step);
        for (int64_t panel = 0; panel < p.panels; ++panel) {
            const int64_t first = p.panel_start(panel), rows = p.panel_start(panel + 1) - first;
            for (int64_t block = item * step; block < end; ++block) tile_of<E, BITS>(rows, p, first, block);
        }
    });
}

template <class E>
void quantized_linear(Problem& p) {
    static thread_local Scratch scratch;
    if (p.s.M == 0 || p.s.N == 0) return;
    p.panels = ceil_div(p.s.M, kMaxRows);
    p.groups = ceil_div(p.s.spans, p.s.per_group);
    const size_t rows = static_cast<size_t>(p.s.M * p.s.spans);
    char* memory = static_cast<char*>(scratch.reserve(rows * (static_cast<size_t>(p.s.span) + 8)));
    p.q = reinterpret_cast<int32_t*>(memory);
    p.step = reinterpret_cast<float*>(memory + rows * static_cast<size_t>(p.s.span));
    p.sum = reinterpret_cast<int32_t*>(p.step + rows);
    if (p.s.bits == 4)
        multiply<E, 4>(p);
    else
        multiply<E, 8>(p);
}

}  // namespace
}  // namespace megpt

// y [M, N] contiguous, x [M, K] with rows x_stride apart, bias [N] or null: all float32 or all bfloat16 (dtype).
// codes, scales, offsets: see above; offsets null for symmetric weights.
MEGPT_EXPORT void megpt_quantized_linear(void* y, const void* x, const void* codes, const void* scales,
                                         const void* offsets, const void* bias, const void* sizes, float unit) {
    megpt::Problem p{};
    p.y = y;
    p.x = x;
    p.codes = static_cast<const uint8_t*>(codes);
    p.scales = static_cast<const uint16_t*>(scales);
    p.offsets = static_cast<const uint16_t*>(offsets);
    p.bias = bias;
    p.unit = unit;
    p.s = *static_cast<const MegptQuantizedSizes*>(sizes);
    if (p.s.dtype == megpt::kBFloat16)
        megpt::quantized_linear<megpt::bf16>(p);
    else
        megpt::quantized_linear<float>(p);
}
