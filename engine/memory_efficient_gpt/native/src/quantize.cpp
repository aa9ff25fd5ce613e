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

// W groups side by side, one a lane: element k of all of them at [k * W]. Groups that are shorter than `size` end
// with zeros that count nothing. counts: null where every element counts 1.
struct Bundle {
    const float* w;
    const float* counts;
    int64_t size;
};

// Sums for one trial's codes c: of i c, i c^2, i c w, where i is what an element counts.
struct Sums {
    Vf c, cc, cw;
};

template <bool WEIGHTED, bool SIGNED>
Sums try_codes(const Bundle& b, Vf inverse, Vf shift, Vf low, Vf high) {
    Sums s{zero(), zero(), zero()};
    for (int64_t k = 0; k < b.size; ++k) {
        const Vf w = load(b.w + k * W);
        const Vf c = max(low, min(high, round(mul(SIGNED ? w : add(w, shift), inverse))));
        const Vf ic = WEIGHTED ? mul(load(b.counts + k * W), c) : c;
        if (!SIGNED) s.c = add(s.c, ic);
        s.cc = fma(ic, c, s.cc);
        s.cw = fma(ic, w, s.cw);
    }
    return s;
}

struct Totals {
    Vf low, high, i, iw, iww;
};

template <bool WEIGHTED>
Totals total(const Bundle& b) {
    Totals t{zero(), zero(), zero(), zero(), zero()};
    for (int64_t k = 0; k < b.size; ++k) {
        const Vf w = load(b.w + k * W), i = WEIGHTED ? load(b.counts + k * W) : set1(1.0f);
        const Vf iw = mul(i, w);
        t.low = min(t.low, w);
        t.high = max(t.high, w);
        t.i = add(t.i, i);
        t.iw = add(t.iw, iw);
        t.iww = fma(iw, w, t.iww);
    }
    return t;
}

// The element of largest magnitude becomes the lowest code, so scales may be negative.
template <bool WEIGHTED>
Vf search_symmetric(const Bundle& b, float middle) {
    const Totals t = total<WEIGHTED>(b);
    const Vf below = sub(zero(), t.low), tiny = set1(kTiny);
    const Vf extreme = select(less(t.high, below), t.low, t.high);
    const Vf base = select(less(max(t.high, below), tiny), tiny, div(extreme, set1(-middle)));
    Vf best = set1(INFINITY), scale = base;
    for (int trial = 0; trial < kTrials; ++trial) {
        const Vf tried = mul(base, set1(shrink(trial)));
        const Sums s = try_codes<WEIGHTED, true>(b, div(set1(1.0f), tried), zero(), set1(-middle), set1(middle - 1.0f));
        const Vf fitted = select(less(zero(), s.cc), div(s.cw, max(s.cc, tiny)), tried);
        const Vf error = add(t.iww, mul(fitted, sub(mul(fitted, s.cc), add(s.cw, s.cw))));
        const auto better = less(error, best);
        best = select(better, error, best);
        scale = select(better, fitted, scale);
    }
    return scale;
}

template <bool WEIGHTED>
void search_asymmetric(const Bundle& b, float top, Vf* scale, Vf* offset) {
    const Totals t = total<WEIGHTED>(b);
    const Vf tiny = set1(kTiny), half = set1(top / 2), i = max(t.i, tiny);
    const Vf base = max(div(sub(t.high, t.low), set1(top)), tiny), middle = add(mul(half, base), t.low);
    Vf best = set1(INFINITY);
    *scale = base;
    *offset = sub(zero(), t.low);
    for (int trial = 0; trial < kTrials; ++trial) {
        Vf s = mul(base, set1(shrink(trial))), o = sub(mul(half, s), middle);
        const Sums u = try_codes<WEIGHTED, false>(b, div(set1(1.0f), s), o, zero(), set1(top));
        const Vf spread = sub(u.cc, div(mul(u.c, u.c), i)), common = sub(u.cw, div(mul(u.c, t.iw), i));
        const auto usable = less(zero(), min(spread, common));
        const Vf fitted = div(common, max(spread, tiny));
        o = select(usable, div(sub(mul(fitted, u.c), t.iw), i), o);
        s = select(usable, fitted, s);
        // The sum of i (w - (s c - o))^2, multiplied out.
        const Vf squares = add(t.iww, add(mul(mul(s, s), u.cc), mul(mul(o, o), t.i)));
        const Vf products = sub(add(mul(s, u.cw), mul(mul(s, o), u.c)), mul(o, t.iw));
        const Vf error = sub(squares, add(products, products));
        const auto better = less(error, best);
        best = select(better, error, best);
        *scale = select(better, s, *scale);
        *offset = select(better, o, *offset);
    }
}

// Groups first..first + W of all, counted row by row.
template <class E>
void search_bundle(float* scales, float* offsets, const E* w, const float* importance, const MegptQuantizeSizes& z,
                   int64_t first) {
    static thread_local Scratch scratch;
    const int64_t size = std::min(z.group, z.K), all = z.N * z.groups;
    const bool weighted = importance != nullptr || z.K % z.group != 0;
    float* held = static_cast<float*>(scratch.reserve(static_cast<size_t>(2 * size * W) * sizeof(float)));
    float* counts = held + size * W;
    for (int64_t lane = 0; lane < W; ++lane) {
        const int64_t n = (first + lane) / z.groups, start = (first + lane) % z.groups * z.group;
        const int64_t end = first + lane < all ? std::min(size, z.K - start) : 0;
        const E* from = w + n * z.K + start;
        for (int64_t k = 0; k < end; ++k) held[k * W + lane] = to_float(from[k]);
        for (int64_t k = end; k < size; ++k) held[k * W + lane] = 0.0f;
        for (int64_t k = 0; weighted && k < size; ++k)
            counts[k * W + lane] = k < end ? (importance ? importance[start + k] : 1.0f) : 0.0f;
    }
    const Bundle b{held, weighted ? counts : nullptr, size};
    const int64_t present = std::min<int64_t>(W, all - first);
    if (offsets == nullptr) {
        const float middle = static_cast<float>(1 << (z.bits - 1));
        store_n(scales + first, weighted ? search_symmetric<true>(b, middle) : search_symmetric<false>(b, middle),
                present);
        return;
    }
    const float top = static_cast<float>((1 << z.bits) - 1);
    Vf scale, offset;
    if (weighted)
        search_asymmetric<true>(b, top, &scale, &offset);
    else
        search_asymmetric<false>(b, top, &scale, &offset);
    store_n(scales + first, scale, present);
    store_n(offsets + first, offset, present);
}

// Codes of a row against its stored scales and offsets; two of 4 bits to a byte, the even input low. The loops are
// written for the compiler to vectorise.
template <class E>
void code_row(uint8_t* codes, const E* w, const float* scales, const float* offsets, const MegptQuantizeSizes& z) {
    static thread_local Scratch scratch;
    const float top = static_cast<float>((1 << z.bits) - 1), middle = static_cast<float>(1 << (z.bits - 1));
    uint8_t* wide = z.bits == 8 ? codes : static_cast<uint8_t*>(scratch.reserve(static_cast<size_t>(z.K) + 1));
    for (int64_t i = 0; i < z.groups; ++i) {
        const int64_t first = i * z.group, end = std::min(z.K, first + z.group);
        const float scale = scales[i], before = offsets ? offsets[i] : 0.0f, after = offsets ? 0.0f : middle;
        for (int64_t k = first; k < end; ++k) {
            const float c = std::nearbyint((to_float(w[k]) + before) / scale) + after;
            wide[k] = static_cast<uint8_t>(static_cast<int32_t>(std::min(std::max(c, 0.0f), top)));
        }
    }
    if (z.bits == 8) return;
    wide[z.K] = 0;
    for (int64_t k = 0; k < ceil_div(z.K, 2); ++k)
        codes[k] = static_cast<uint8_t>(wide[2 * k] | wide[2 * k + 1] << 4);
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
    const int64_t bundles = megpt::ceil_div(z.N * z.groups, megpt::W);
    const int64_t each = std::max<int64_t>(4096 / std::min(z.group, z.K), 1);  // bundles of a work item
    const double work = static_cast<double>(z.N) * static_cast<double>(z.K) / 300.0;
    megpt::parallel_for(megpt::ceil_div(bundles, each), megpt::useful_threads(z.threads, work), [&](int64_t item) {
        for (int64_t b = item * each; b < std::min(bundles, (item + 1) * each); ++b) {
            if (z.dtype == megpt::kBFloat16)
                megpt::search_bundle(scales, offsets, static_cast<const megpt::bf16*>(w), importance, z, b * megpt::W);
            else
                megpt::search_bundle(scales, offsets, static_cast<const float*>(w), importance, z, b * megpt::W);
        }
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
