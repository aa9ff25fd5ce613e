// Dot products of unsigned codes and signed bytes, on the instruction sets of simd.h.
//
// Purpose: `Vi` (W lanes of int32, or 4 W bytes) for kernels over quantized weights. Does not know: layouts,
// scales. Invariant: integer sums are exact on every instruction set, so all of them give the same numbers.
#pragma once

#include "simd.h"

namespace megpt {

#if defined(MEGPT_AVX512)

using Vi = __m512i;
inline Vi splat(int32_t x) { return _mm512_set1_epi32(x); }
inline Vi load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Vi low_nibbles(Vi v) { return _mm512_and_si512(v, _mm512_set1_epi8(0x0f)); }
inline Vi high_nibbles(Vi v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
inline Vf to_float(Vi v) { return _mm512_cvtepi32_ps(v); }
inline Vf load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#if defined(__AVX512VNNI__)
#define MEGPT_VNNI 1
inline Vi dot_bytes(Vi sum, Vi codes, Vi x) { return _mm512_dpbusd_epi32(sum, codes, x); }
#else
inline Vi dot_nibbles(Vi sum, Vi codes, Vi x) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), _mm512_set1_epi16(1)));
}
inline Vi times16(Vi v) { return _mm512_slli_epi32(v, 4); }
inline Vi plus(Vi a, Vi b) { return _mm512_add_epi32(a, b); }
#endif

#elif defined(MEGPT_AVX2)

using Vi = __m256i;
inline Vi splat(int32_t x) { return _mm256_set1_epi32(x); }
inline Vi load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Vi low_nibbles(Vi v) { return _mm256_and_si256(v, _mm256_set1_epi8(0x0f)); }
inline Vi high_nibbles(Vi v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
inline Vf to_float(Vi v) { return _mm256_cvtepi32_ps(v); }
inline Vf load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#if defined(__AVXVNNI__)
#define MEGPT_VNNI 1
inline Vi dot_bytes(Vi sum, Vi codes, Vi x) { return _mm256_dpbusd_avx_epi32(sum, codes, x); }
#else
inline Vi dot_nibbles(Vi sum, Vi codes, Vi x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
}
inline Vi times16(Vi v) { return _mm256_slli_epi32(v, 4); }
inline Vi plus(Vi a, Vi b) { return _mm256_add_epi32(a, b); }
#endif

#else

typedef int32_t Vi __attribute__((vector_size(4 * W)));
inline Vi splat(int32_t x) { return Vi{x, x, x, x}; }
inline Vi load_codes(const uint8_t* p) {
    Vi v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline Vi low_nibbles(Vi v) { return v & 0x0f0f0f0f; }
inline Vi high_nibbles(Vi v) { return (v >> 4) & 0x0f0f0f0f; }
inline Vf to_float(Vi v) { return __builtin_convertvector(v, Vf); }
inline float half_to_float(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    if (rest < 0x0400u) {  // zero or subnormal
        const float value = static_cast<float>(rest) * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t wide = sign | (rest >= 0x7c00u ? 0x7f800000u | (rest & 0x3ffu) << 13 : (rest << 13) + 0x38000000u);
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}
inline Vf load_half(const uint16_t* p) {
    return Vf{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
#define MEGPT_VNNI 1  // not the instruction, but a dot product of bytes that cannot overflow
inline Vi dot_bytes(Vi sum, Vi codes, Vi x) {
    for (int j = 0; j < 32; j += 8) sum += ((codes >> j) & 0xff) * ((x << (24 - j)) >> 24);
    return sum;
}

#endif

#if defined(MEGPT_VNNI)
// sum + codes . x, four bytes a lane: codes 0..15.
inline Vi dot_nibbles(Vi sum, Vi codes, Vi x) { return dot_bytes(sum, codes, x); }
#else
// sum + codes . x, four bytes a lane: codes 0..255. Two nibbles, because the 16-bit sums of pairs saturate.
inline Vi dot_bytes(Vi sum, Vi codes, Vi x) {
    const Vi high = dot_nibbles(splat(0), high_nibbles(codes), x);
    return plus(dot_nibbles(sum, low_nibbles(codes), x), times16(high));
}
#endif

}  // namespace megpt
