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

#include "quantized_amx.h"
#include "quantized_linear.h"

namespace megpt {
namespace {

constexpr int kVectors = kBlock / W;            // vectors of a block
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

struct Problem : QuantizedProblem {
    int64_t panels;
    int32_t* q;
    float* step;
    int32_t* sum;

    int64_t panel_start(int64_t panel) const { return panel * s.M / panels; }
    Panel panel(int64_t first_row) const {
        return {q + first_row * s.spans * s.span / 4, step + first_row * s.spans, sum + first_row * s.spans};
    }
};

template <class E>
void round_panel(const Problem& p, int64_t panel) {
    const int64_t first = p.panel_start(panel), rows = p.panel_start(panel + 1) - first;
    const int64_t words = p.s.span / 4;
    int32_t* q = p.q + first * p.s.spans * words;
    alignas(64) int8_t held[128];
    for (int64_t r = 0; r < rows; ++r) {
        const E* x = static_cast<const E*>(p.x) + (first + r) * p.s.x_stride;
        for (int64_t i = 0; i < p.s.spans; ++i) {
            const int64_t at = first * p.s.spans + i * rows + r;
            int8_t* out = rows == 1 ? reinterpret_cast<int8_t*>(q + i * words) : held;
            p.step[at] = round_span(x + i * p.s.span, p.span_inputs(i), p.s.span, p.unit, out);
            p.sum[at] = sum_of(out, p.s.span);
            if (rows == 1) continue;
            for (int64_t k = 0; k < words; ++k) std::memcpy(q + (i * words + k) * rows + r, held + 4 * k, 4);
        }
    }
}

// MR rows of x by one block of w.
template <class E, int BITS, int MR>
void tile(const Problem& p, int64_t first_row, int64_t block) {
    const Panel panel = p.panel(first_row);
    const int64_t units = p.s.span * BITS / 32;
    const bool symmetric = p.offsets == nullptr;
    const int64_t groups = p.groups();
    for (int h = 0; h < kVectors; ++h) {
        const uint8_t* w = p.codes + block * p.block_bytes() + h * W * 4;
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
            const int64_t at = (block * groups + i / p.s.per_group) * kBlock + h * W;
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
        for (int m = 0; m < MR; ++m) store_outputs<E>(p, total[m], first_row + m, block * kBlock + h * W);
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
    const int64_t blocks = p.blocks();
    // One thread's pace: 200 products a nanosecond, 20 bytes of codes.
    const int team = useful_threads(p.s.threads, std::max(p.products() / 200e3, p.bytes() / 20e3));
    parallel_for(p.panels, p.panels >= 8 ? team : 1, [&](int64_t panel) { round_panel<E>(p, panel); });
    int64_t step = std::max<int64_t>(kItemBytes / p.block_bytes(), 1);
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
#if defined(MEGPT_AMX)
    if (amx_permitted() && suits_tiles(p.s.M)) return amx::multiply<E>(p);
#endif
    p.panels = ceil_div(p.s.M, kMaxRows);
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
