// Vf in the compilers' own vector language (GCC, Clang): 4 floats, any CPU. Included by simd.h only.
#pragma once

namespace megpt {

constexpr int W = 4;
constexpr int kColumnVectors = 2;  // accumulators of a register tile: 6 rows of 2 vectors, of 16 registers
typedef float Vf __attribute__((vector_size(16)));
typedef int32_t Vm __attribute__((vector_size(16)));

inline Vf zero() { return Vf{0, 0, 0, 0}; }
inline Vf set1(float x) { return Vf{x, x, x, x}; }
inline Vf lane_index() { return Vf{0, 1, 2, 3}; }
inline Vf add(Vf a, Vf b) { return a + b; }
inline Vf sub(Vf a, Vf b) { return a - b; }
inline Vf mul(Vf a, Vf b) { return a * b; }
inline Vf div(Vf a, Vf b) { return a / b; }
inline Vf fma(Vf a, Vf b, Vf c) { return a * b + c; }  // two roundings: no fused instruction is assumed
inline Vm less(Vf a, Vf b) { return a < b; }
inline Vf select(Vm m, Vf yes, Vf no) { return (Vf)((m & (Vm)yes) | (~m & (Vm)no)); }
inline Vf max(Vf a, Vf b) { return select(a > b, a, b); }
inline Vf min(Vf a, Vf b) { return select(a < b, a, b); }
inline Vf abs(Vf a) { return (Vf)((Vm)a & 0x7fffffff); }
// To the nearest whole number, ties to even: adding 1.5 * 2^23 leaves no fraction bits.
inline Vf round(Vf a) {
    const Vf magic = set1(12582912.0f);
    const Vf whole = (a + magic) - magic;
    return select(abs(a) < set1(4194304.0f), whole, a);
}
// a * 2^n for whole n in [-252, 254], in two halves because 2^n alone may leave the range.
inline Vf scale_by_power(Vf a, Vf n) {
    const Vm whole = __builtin_convertvector(select(abs(n) < set1(512.0f), n, zero()), Vm);
    const Vm half = whole >> 1;
    return a * (Vf)((half + 127) << 23) * (Vf)((whole - half + 127) << 23);
}

inline Vf load(const float* p) {
    Vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline Vf load(const bf16* p) { return Vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
inline Vf load(const int8_t* p) { return Vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
inline void store(float* p, Vf v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, Vf v) {
    for (int i = 0; i < W; ++i) p[i] = to_bf16(v[i]);
}
inline Vf round_to_bf16(Vf v) {
    for (int i = 0; i < W; ++i) v[i] = to_float(to_bf16(v[i]));
    return v;
}
inline void store(int8_t* p, Vf v) {
    const Vf whole = round(v);
    for (int i = 0; i < W; ++i) p[i] = static_cast<int8_t>(whole[i] > 127 ? 127 : whole[i] < -128 ? -128 : whole[i]);
}

// The order of every horizontal sum: lane i + lane i+2, then +1.
inline float reduce_add(Vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline void reduce_add4(const Vf* v, float* out) {
    for (int i = 0; i < 4; ++i) out[i] = reduce_add(v[i]);
}
inline void reduce_add16(const Vf* v, float* out) {
    for (int i = 0; i < 16; i += 4) reduce_add4(v + i, out + i);
}
inline float reduce_max(Vf v) {
    float m = v[0];
    for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
    return m;
}

// Rows become columns, in place: v[i] lane j <- v[j] lane i.
inline void transpose(Vf* v) {
    Vf t[W];
    for (int i = 0; i < W; ++i) t[i] = Vf{v[0][i], v[1][i], v[2][i], v[3][i]};
    for (int i = 0; i < W; ++i) v[i] = t[i];
}

// One chunk of a bfloat16 dot product: 8 elements, even ones first.
typedef uint32_t Bf16Chunk __attribute__((vector_size(16)));
inline Bf16Chunk load_chunk(const bf16* p) {
    Bf16Chunk v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline Vf dot_step(Vf sum, Bf16Chunk a, Bf16Chunk b) {
    sum = fma((Vf)(a << 16), (Vf)(b << 16), sum);
    return fma((Vf)(a & 0xffff0000u), (Vf)(b & 0xffff0000u), sum);
}

}  // namespace megpt
