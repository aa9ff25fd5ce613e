// What the ways to multiply by quantized weights share: the problem, the rounding of x, the writing of y.
//
// Does not know: the order in which memory is walked. Invariant: a span's step and its bytes depend on that span
// of that row only; see quantized_linear.cpp for the method and the letters.
#pragma once

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

constexpr int kBlock = 16;  // outputs of a block
constexpr int kUnit = 64;   // bytes of a unit

struct QuantizedProblem {
    void* y;
    const void* x;
    const uint8_t* codes;
    const uint16_t* scales;   // [blocks][groups][16] half
    const uint16_t* offsets;  // likewise, scale * zero; null: zero is the middle code
    const void* bias;         // [N] or null
    float unit;               // what all scales and offsets are multiplied by
    MegptQuantizedSizes s;

    int64_t blocks() const { return ceil_div(s.N, kBlock); }
    int64_t groups() const { return ceil_div(s.spans, s.per_group); }
    int64_t block_bytes() const { return s.spans * s.span * kBlock * s.bits / 8; }
    double bytes() const { return static_cast<double>(blocks()) * static_cast<double>(block_bytes()); }
    double products() const { return bytes() * 8 / static_cast<double>(s.bits) * static_cast<double>(s.M); }
    int64_t span_inputs(int64_t i) const { return std::min(s.span, s.K - i * s.span); }
};

// One row's span of n inputs: q into `out`, padded with zeros; returns the step. What is not finite gives NaN.
template <class E>
float round_span(const E* x, int64_t n, int64_t span, float unit, int8_t* out) {
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
    return tail / 127.0f * unit + bad;
}

inline int32_t sum_of(const int8_t* q, int64_t span) {
    int32_t total = 0;
    for (int64_t i = 0; i < span; ++i) total += q[i];
    return total;
}

// W outputs of a row, from `column` on, and the bias.
template <class E>
void store_outputs(const QuantizedProblem& p, Vf value, int64_t row, int64_t column) {
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

}  // namespace megpt
