// One vector of floats, on three instruction sets.
//
// Purpose: `Vf` (W floats) with loads and stores that convert from and to bfloat16 and int8, so that the
// kernels are written once. Does not know: kernels. Invariant: the result of an operation on one lane, and of
// a reduction, depends on the vector's contents only; sums are fused (fma) only where the code says so.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(MEGPT_PORTABLE)
#define MEGPT_ISA "portable"
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define MEGPT_AVX512 1
#define MEGPT_ISA "avx512"
#elif defined(__AVX2__) && defined(__FMA__)
#define MEGPT_AVX2 1
#define MEGPT_ISA "avx2"
#else
#define MEGPT_ISA "portable"
#endif

#if defined(MEGPT_AVX512) || defined(MEGPT_AVX2)
#include <immintrin.h>
#endif
#if defined(MEGPT_AVX512) && defined(__AVX512BF16__)
#define MEGPT_BF16_DOT 1
#endif

namespace megpt {

struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return static_cast<float>(x); }
inline float to_float(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Round to nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fc0};
    return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16 from_float<bf16>(float x) { return to_bf16(x); }

}  // namespace megpt

#if defined(MEGPT_AVX512)
#include "simd_avx512.h"
#elif defined(MEGPT_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace megpt {

// The first n lanes from memory, zero beyond; reads nothing beyond p[n - 1].
template <class T>
inline Vf load_n(const T* p, int64_t n) {
    T padded[W] = {};
    std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
    return load(padded);
}

template <class T>
inline void store_n(T* p, Vf v, int64_t n) {
    T padded[W];
    store(padded, v);
    std::memcpy(p, padded, static_cast<size_t>(n) * sizeof(T));
}

// x rounded to T's precision and back: what a tensor of that type would have held in between.
template <class T>
inline Vf rounded(Vf x);
template <>
inline Vf rounded<float>(Vf x) { return x; }
template <>
inline Vf rounded<bf16>(Vf x) { return round_to_bf16(x); }

// exp(x) to about 1 ulp; exactly 0 below -87.34 (the least normal result), so exp(-inf) is 0; NaN is kept.
// Method: 2^n * p(r), r = x - n ln 2 in two steps, |r| <= ln(2)/2, p the Taylor polynomial of degree 7.
inline Vf exp(Vf x) {
    const Vf n = round(mul(x, set1(1.44269504088896341f)));
    Vf r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    Vf p = set1(1.0f / 5040.0f);
    p = fma(p, r, set1(1.0f / 720.0f));
    p = fma(p, r, set1(1.0f / 120.0f));
    p = fma(p, r, set1(1.0f / 24.0f));
    p = fma(p, r, set1(1.0f / 6.0f));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    const Vf y = scale_by_power(p, n);
    const Vf inf = set1(INFINITY);
    const Vf high = select(less(set1(88.72283f), x), inf, y);
    return select(less(x, set1(-87.33654f)), zero(), high);
}

// tanh(x) = 1 - 2 / (exp(2x) + 1); absolute error about 1e-7.
inline Vf tanh(Vf x) {
    const Vf e = exp(add(x, x));
    return sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
}

}  // namespace megpt
