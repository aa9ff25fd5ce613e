// Choosing scales, offsets and codes for weights of 4 or 8 bits.
//
// Method: for each group many scales around its range; for each of them the codes it gives, and the scale (and
// offset) that fits those codes best by weighted least squares; the best of all is kept. A trial is one pass,
// because the error after refitting follows from the sums that refitting needs. Invariant: a group's result
// depends on that group only. The plain definition is quantization/rounding.py.
//
// Letters: w [N, K], G groups of an output. weight = scale * code - offset; symmetric: offset = scale * middle.

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "simd_int8.h"

extern "C" struct MegptQuantizeSizes {
    int64_t N, K, group, groups, bits, dtype, threads;
};

namespace megpt {
namespace {

constexpr float kTiny = 1e-30f;
constexpr int kTrials = 25;
inline float shrink(int trial) { return 1.15f - 0.025f * static_cast<float>(trial); }

// A group as float32, padded with zeros that count nothing.
struct Group {
    float* w;
    float* counts;
    int64_t size;  // a multiple of W
};

// Sums over a group for one trial's codes c: of i c, i c^2, i c w.
struct Sums {
    float c, cc, cw;
};

template <bool SIGNED>
Sums try_codes(const Group& g, float inverse, float shift, float low, float high) {
    Vf c1 = zero(), c2 = zero(), cw = zero();
    const Vf inv = set1(inverse), add_ = set1(shift), lo = set1(low), hi = set1(high);
    for (int64_t k = 0; k < g.size; k += W) {
        const Vf w = load(g.w + k), i = load(g.counts + k);
        Vf c = SIGNED ? round(mul(w, inv)) : round(mul(add(w, add_), inv));
        c = max(lo, sub(zero(), max(sub(zero(), c), sub(zero(), hi))));  // max, then min by signs
        const Vf ic = mul(i, c);
        if (!SIGNED) c1 = add(c1, ic);
        c2 = fma(ic, c, c2);
        cw = fma(ic, w, cw);
    }
    return {SIGNED ? 0.0f : reduce_add(c1), reduce_add(c2), reduce_add(cw)};
}

// The element of largest magnitude becomes the lowest code, so scales may be negative.
float search_symmetric(const Group& g, float middle) {
    float extreme = 0.0f, total = 0.0f;
    for (int64_t k = 0; k < g.size; ++k) {
        if (std::fabs(g.w[k]) > std::fabs(extreme)) extreme = g.w[k];
        total += g.counts[k] * g.w[k] * g.w[k];
    }
    const float base = std::fabs(extreme) < kTiny ? kTiny : -extreme / middle;
    float best = INFINITY, scale = base;
    for (int trial = 0; trial < kTrials; ++trial) {
        const float tried = base * shrink(trial);
        const Sums s = try_codes<true>(g, 1.0f / tried, 0.0f, -middle, middle - 1.0f);
        const float fitted = s.cc > 0.0f ? s.cw / std::max(s.cc, kTiny) : tried;
        const float error = total - 2.0f * fitted * s.cw + fitted * fitted * s.cc;
        if (error < best) {
            best = error;
            scale = fitted;
        }
    }
    return scale;
}

void search_asymmetric(const Group& g, float top, float* scale, float* offset) {
    float low = 0.0f, high = 0.0f, i = 0.0f, iw = 0.0f, iww = 0.0f;
    for (int64_t k = 0; k < g.size; ++k) {
        low = std::min(low, g.w[k]);
        high = std::max(high, g.w[k]);
        i += g.counts[k];
        iw += g.counts[k] * g.w[k];
        iww += g.counts[k] * g.w[k] * g.w[k];
    }
    const float base = std::max((high - low) / top, kTiny), middle = top / 2 * base + low;
    i = std::max(i, kTiny);
    float best = INFINITY;
    *scale = base;
    *offset = -low;
    for (int trial = 0; trial < kTrials; ++trial) {
        float s = base * shrink(trial), o = top / 2 * s - middle;
        const Sums t = try_codes<false>(g, 1.0f / s, o, 0.0f, top);
        const float spread = t.cc - t.c * t.c / i, common = t.cw - t.c * iw / i;
        if (spread > 0.0f && common > 0.0f) {
            s = common / spread;
            o = s * t.c / i - iw / i;
        }
        const float error = iww - 2 * s * t.cw + 2 * o * iw + s * s * t.cc - 2 * s * o * t.c + o * o * i;
        if (error < best) {
            best = error;
            *scale = s;
            *offset = o;
        }
    }
}

template <class E>
void search_row(float* scales, float* offsets, const E* w, const float* importance, const MegptQuantizeSizes& z) {
    static thread_local Scratch scratch;
    const int64_t padded = round_up(z.group, W);
    float* memory = static_cast<float*>(scratch.reserve(static_cast<size_t>(2 * padded) * sizeof(float)));
    for (int64_t i = 0; i < z.groups; ++i) {
        const int64_t first = i * z.group, n = std::min(z.group, z.K - first);
        Group g{memory, memory + padded, round_up(n, W)};
        for (int64_t k = 0; k < g.size; ++k) {
            g.w[k] = k < n ? to_float(w[first + k]) : 0.0f;
            g.counts[k] = k < n ? (importance ? importance[first + k] : 1.0f) : 0.0f;
        }
        if (offsets == nullptr)
            scales[i] = search_symmetric(g, static_cast<float>(1 << (z.bits - 1)));
        else
            search_asymmetric(g, static_cast<float>((1 << z.bits) - 1), scales + i, offsets + i);
    }
}

// Codes of a row against its stored scales and offsets; two of 4 bits to a byte, the even input low.
template <class E>
void code_row(uint8_t* codes, const E* w, const float* scales, const float* offsets, const MegptQuantizeSizes& z) {
    const float top = static_cast<float>((1 << z.bits) - 1), middle = static_cast<float>(1 << (z.bits - 1));
    for (int64_t i = 0; i < z.groups; ++i) {
        const int64_t first = i * z.group, end = std::min(z.K, first + z.group);
        for (int64_t k = first; k < end; ++k) {
            const float v = to_float(w[k]);
            const float c = offsets ? std::nearbyint((v + offsets[i]) / scales[i]) : std::nearbyint(v / scales[i]) + middle;
            const uint8_t code = static_cast<uint8_t>(std::min(std::max(c, 0.0f), top));
            if (z.bits == 8)
                codes[k] = code;
            else if (k % 2 == 0)
                codes[k / 2] = code;
            else
                codes[k / 2] = static_cast<uint8_t>(codes[k / 2] | code << 4);
        }
    }
}

template <class Body>
void for_outputs(const MegptQuantizeSizes& z, double pace, const Body& body) {
    const double work = static_cast<double>(z.N) * static_cast<double>(z.K) / pace;
    const int team = useful_threads(z.threads, work);
    const int64_t rows = std::max<int64_t>(ceil_div(z.N, 16 * team), 1);
    parallel_for(ceil_div(z.N, rows), team, [&](int64_t item) {
        for (int64_t n = item * rows; n < std::min(z.N, (item + 1) * rows); ++n) body(n);
    });
}

// Eight codes in the order of their inputs, first lowest, to the order of a unit: 0 4 1 5 2 6 3 7.
inline uint32_t interleave(uint32_t c) {
    const auto spread = [](uint32_t x) {  // four nibbles to the low halves of four bytes
        x = (x | x << 8) & 0x00ff00ffu;
        return (x | x << 4) & 0x0f0f0f0fu;
    };
    return spread(c & 0xffffu) | spread(c >> 16) << 4;
}

}  // namespace
}  // namespace megpt

// scales [N, G] float32, offsets likewise or null (symmetric), w [N, K] contiguous of `dtype`, importance [K] or null.
MEGPT_EXPORT void megpt_search_scales(float* scales, float* offsets, const void* w, const float* importance,
                                      const void* sizes) {
    const MegptQuantizeSizes z = *static_cast<const MegptQuantizeSizes*>(sizes);
    megpt::for_outputs(z, 300.0, [&](int64_t n) {
        float* o = offsets ? offsets + n * z.groups : nullptr;
        if (z.dtype == megpt::kBFloat16)
            megpt::search_row(scales + n * z.groups, o, static_cast<const megpt::bf16*>(w) + n * z.K, importance, z);
        else
            megpt::search_row(scales + n * z.groups, o, static_cast<const float*>(w) + n * z.K, importance, z);
    });
}

// codes [N, K] or [N, ceil(K / 2)] bytes, chosen against scales and offsets [N, G] float32 as they are stored.
MEGPT_EXPORT void megpt_choose_codes(uint8_t* codes, const void* w, const float* scales, const float* offsets,
                                     const void* sizes) {
    const MegptQuantizeSizes z = *static_cast<const MegptQuantizeSizes*>(sizes);
    const int64_t width = z.bits == 4 ? megpt::ceil_div(z.K, 2) : z.K;
    megpt::for_outputs(z, 300.0, [&](int64_t n) {
        const float* o = offsets ? offsets + n * z.groups : nullptr;
        if (z.dtype == megpt::kBFloat16)
            megpt::code_row(codes + n * width, static_cast<const megpt::bf16*>(w) + n * z.K, scales + n * z.groups, o, z);
        else
            megpt::code_row(codes + n * width, static_cast<const float*>(w) + n * z.K, scales + n * z.groups, o, z);
    });
}

// From codes as they are stored, rows of `width` bytes, to blocks of `units` * 64 bytes (see quantized_linear.cpp);
// out is zeroed where there are no codes.
MEGPT_EXPORT void megpt_pack_codes(uint8_t* out, const uint8_t* codes, int64_t N, int64_t width, int64_t units,
                                   int64_t bits, int64_t threads) {
    const int64_t blocks = megpt::ceil_div(N, 16);
    const double work = static_cast<double>(blocks * units * 64) / 1e3;
    megpt::parallel_for(blocks, megpt::useful_threads(threads, work), [&](int64_t block) {
        uint8_t* to = out + block * units * 64;
        for (int64_t u = 0; u < units; ++u)
            for (int64_t r = 0; r < 16; ++r) {
                const int64_t row = block * 16 + r, left = row < N ? width - 4 * u : 0;
                uint32_t four = 0;
                if (left > 0) std::memcpy(&four, codes + row * width + 4 * u, static_cast<size_t>(std::min<int64_t>(left, 4)));
                if (bits == 4) four = megpt::interleave(four);
                std::memcpy(to + u * 64 + r * 4, &four, 4);
            }
    });
}
