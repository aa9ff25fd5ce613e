// Operations on rows: normalisation, gated activations, rotary positions.
//
// Invariant: a row's result depends on that row only. Where a model's own code rounds to its dtype between two
// operations, so does this: results match the module that is replaced, not only approximately.
//
// Letters: R rows, D elements of a row, T tokens, H heads.

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace megpt {
namespace {

// body(row) for R rows of D elements, several rows to a work item. pace: elements a thread does in 1 us.
template <class Body>
void for_rows(int64_t R, int64_t D, double pace, int64_t threads, const Body& body) {
    const int team = useful_threads(threads, static_cast<double>(R) * static_cast<double>(D) / pace);
    const int64_t rows = std::max<int64_t>(ceil_div(R, 4 * team), 1);
    parallel_for(ceil_div(R, rows), team, [&](int64_t item) {
        for (int64_t r = item * rows; r < std::min(R, (item + 1) * rows); ++r) body(r);
    });
}

// f(d, n) for whole vectors (n = W) and the rest of a row.
template <class F>
inline void for_vectors(int64_t D, const F& f) {
    int64_t d = 0;
    for (; d + W <= D; d += W) f(d, static_cast<int64_t>(W));
    if (d < D) f(d, D - d);
}

template <class T>
inline Vf load_some(const T* p, int64_t n) { return n == W ? load(p) : load_n(p, n); }

template <class T>
inline void store_some(T* p, Vf v, int64_t n) {
    if (n == W)
        store(p, v);
    else
        store_n(p, v, n);
}

enum NormStyle : int64_t {
    kRoundThenScale = 0,  // weight * (x / rms rounded to the dtype), as Llama
    kOnePlusWeight = 1,   // x / rms * (1 + weight), rounded once, as Gemma
    kScaleThenRound = 2,  // x / rms * weight, rounded once
};

template <class T>
void rms_norm_row(T* out, const T* x, const T* weight, int64_t D, float eps, int64_t style) {
    Vf sums[4] = {zero(), zero(), zero(), zero()};
    for_vectors(D, [&](int64_t d, int64_t n) {
        const Vf v = load_some(x + d, n);
        Vf& sum = sums[d / W % 4];
        sum = fma(v, v, sum);
    });
    const float total = reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    const Vf inverse = set1(1.0f / std::sqrt(total / static_cast<float>(D) + eps));
    for_vectors(D, [&](int64_t d, int64_t n) {
        Vf v = mul(load_some(x + d, n), inverse);
        if (weight) {
            const Vf w = load_some(weight + d, n);
            if (style == kRoundThenScale) v = rounded<T>(v);
            v = mul(v, style == kOnePlusWeight ? add(w, set1(1.0f)) : w);
        }
        store_some(out + d, v, n);
    });
}

enum Activation : int64_t { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

// erf by Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7.
inline Vf erf(Vf x) {
    const Vf a = abs(x);
    const Vf t = div(set1(1.0f), fma(a, set1(0.3275911f), set1(1.0f)));
    Vf p = set1(1.061405429f);
    p = fma(p, t, set1(-1.453152027f));
    p = fma(p, t, set1(1.421413741f));
    p = fma(p, t, set1(-0.284496736f));
    p = fma(p, t, set1(0.254829592f));
    const Vf y = sub(set1(1.0f), mul(mul(p, t), exp(sub(zero(), mul(a, a)))));
    return select(less(x, zero()), sub(zero(), y), y);
}

// x * sigmoid(y).
inline Vf times_sigmoid(Vf x, Vf y) { return div(x, add(set1(1.0f), exp(sub(zero(), y)))); }

inline Vf activate(Vf x, int64_t kind) {
    if (kind == kSilu) return times_sigmoid(x, x);
    if (kind == kGelu) return mul(mul(x, set1(0.5f)), add(set1(1.0f), erf(mul(x, set1(0.70710678f)))));
    // (1 + tanh(z)) / 2 = sigmoid(2 z), which loses nothing where tanh is near -1.
    const Vf cube = mul(mul(x, x), x);
    return times_sigmoid(x, mul(fma(cube, set1(0.044715f), x), set1(2 * 0.79788456f)));
}

template <class T>
void gated_row(T* out, const T* gate, const T* up, int64_t D, int64_t kind) {
    for_vectors(D, [&](int64_t d, int64_t n) {
        const Vf active = rounded<T>(activate(load_some(gate + d, n), kind));
        store_some(out + d, mul(active, load_some(up + d, n)), n);
    });
}

// The first 2 * half elements of a head turn; each product is rounded, then their sum, as torch would.
template <class T>
void rotate(T* x, const T* cos, const T* sin, int64_t half) {
    for_vectors(half, [&](int64_t d, int64_t n) {
        const Vf a = load_some(x + d, n), b = load_some(x + half + d, n);
        const Vf first = sub(rounded<T>(mul(a, load_some(cos + d, n))), rounded<T>(mul(b, load_some(sin + d, n))));
        const Vf second = add(rounded<T>(mul(b, load_some(cos + half + d, n))),
                              rounded<T>(mul(a, load_some(sin + half + d, n))));
        store_some(x + d, first, n);
        store_some(x + half + d, second, n);
    });
}

template <class T>
const T* at(const void* p, int64_t elements) { return static_cast<const T*>(p) + elements; }
template <class T>
T* at(void* p, int64_t elements) { return static_cast<T*>(p) + elements; }

template <class T>
void rope(void* x, const void* cos, const void* sin, int64_t T_, int64_t H, int64_t rotary, int64_t stride_t,
          int64_t stride_h, int64_t threads) {
    for_rows(T_, H * rotary, 2e3, threads, [&](int64_t t) {
        for (int64_t h = 0; h < H; ++h)
            rotate(at<T>(x, t * stride_t + h * stride_h), at<T>(cos, t * rotary), at<T>(sin, t * rotary), rotary / 2);
    });
}

}  // namespace
}  // namespace megpt

using megpt::at;
using megpt::bf16;
using megpt::for_rows;
using megpt::kBFloat16;

// out [R, D] contiguous, x [R, D] with rows x_stride apart, weight [D] or null; one dtype.
MEGPT_EXPORT void megpt_rms_norm(void* out, const void* x, const void* weight, int64_t R, int64_t D,
                                 int64_t x_stride, float eps, int64_t style, int64_t dtype, int64_t threads) {
    for_rows(R, D, 6e3, threads, [&](int64_t r) {
        if (dtype == kBFloat16)
            megpt::rms_norm_row(at<bf16>(out, r * D), at<bf16>(x, r * x_stride), static_cast<const bf16*>(weight), D,
                                eps, style);
        else
            megpt::rms_norm_row(at<float>(out, r * D), at<float>(x, r * x_stride), static_cast<const float*>(weight),
                                D, eps, style);
    });
}

// out [R, D] = activation(gate) * up, rows of gate and up stride apart; one dtype.
MEGPT_EXPORT void megpt_gated(void* out, const void* gate, const void* up, int64_t R, int64_t D, int64_t gate_stride,
                              int64_t up_stride, int64_t kind, int64_t dtype, int64_t threads) {
    for_rows(R, D, 2e3, threads, [&](int64_t r) {
        if (dtype == kBFloat16)
            megpt::gated_row(at<bf16>(out, r * D), at<bf16>(gate, r * gate_stride), at<bf16>(up, r * up_stride), D,
                             kind);
        else
            megpt::gated_row(at<float>(out, r * D), at<float>(gate, r * gate_stride), at<float>(up, r * up_stride), D,
                             kind);
    });
}

// x [T, H, >= rotary] in place, cos and sin [T, rotary] contiguous; the halves of `rotary` are a pair.
MEGPT_EXPORT void megpt_rope(void* x, const void* cos, const void* sin, int64_t T, int64_t H, int64_t rotary,
                             int64_t stride_t, int64_t stride_h, int64_t dtype, int64_t threads) {
    if (dtype == kBFloat16)
        megpt::rope<bf16>(x, cos, sin, T, H, rotary, stride_t, stride_h, threads);
    else
        megpt::rope<float>(x, cos, sin, T, H, rotary, stride_t, stride_h, threads);
}
