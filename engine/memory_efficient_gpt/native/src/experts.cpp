// Routed gated MLPs: each token's experts, whose weights are stacked, and the weighted sum of their results.
//
// Method: tokens are put together by expert, so that an expert's weights are read once; the products are those of
// linear.cpp and quantized_linear.cpp. Invariant: a token's result does not depend on the other tokens, since no
// product's row does; its experts are summed in the order in which they were chosen, in float32.
//
// Letters: T tokens, k experts of a token, E experts, D hidden size, I inner size.

#include <cstring>
#include <vector>

#include "parallel.h"
#include "simd.h"

// One of the two stacks [E, N, K]. codes is the float weight where bits is 0; else codes, scales and offsets as in
// quantized_linear.cpp, an expert's outputs being whole blocks. *_bytes: of one expert.
extern "C" struct MegptStack {
    int64_t codes, scales, offsets;
    int64_t codes_bytes, scales_bytes, offsets_bytes;
    int64_t bits, span, spans, per_group;
    double unit;
};

extern "C" struct MegptExpertsSizes {
    int64_t T, k, E, D, I, activation, dtype, threads;
    MegptStack gate_up, down;
};

extern "C" struct MegptLinearSizes {
    int64_t M, N, K, bits, span, spans, per_group, x_stride, dtype, threads;
};

MEGPT_EXPORT void megpt_linear(void*, const void*, const void*, const void*, int64_t, int64_t, int64_t, int64_t,
                               int64_t, int64_t);
MEGPT_EXPORT void megpt_quantized_linear(void*, const void*, const void*, const void*, const void*, const void*,
                                         const void*, float);
MEGPT_EXPORT void megpt_gated(void*, const void*, const void*, int64_t, int64_t, int64_t, int64_t, int64_t,
                              int64_t, int64_t);

namespace megpt {
namespace {

void multiply(void* y, const void* x, const MegptStack& s, int64_t expert, int64_t M, int64_t N, int64_t K,
              int64_t dtype, int64_t threads) {
    const auto part = [&](int64_t address, int64_t bytes) {
        return address ? reinterpret_cast<const void*>(address + expert * bytes) : nullptr;
    };
    if (s.bits == 0) {
        megpt_linear(y, x, part(s.codes, s.codes_bytes), nullptr, M, N, K, K, dtype, threads);
        return;
    }
    const MegptLinearSizes sizes{M, N, K, s.bits, s.span, s.spans, s.per_group, K, dtype, threads};
    megpt_quantized_linear(y, x, part(s.codes, s.codes_bytes), part(s.scales, s.scales_bytes),
                           part(s.offsets, s.offsets_bytes), nullptr, &sizes, static_cast<float>(s.unit));
}

template <class T>
void weighted_sum(T* out, const T* results, const float* weights, const int64_t* index, const MegptExpertsSizes& n) {
    parallel_for(n.T, useful_threads(n.threads, static_cast<double>(n.T * n.k * n.D) / 2e3), [&](int64_t t) {
        std::vector<float> sum(static_cast<size_t>(n.D), 0.0f);
        for (int64_t j = 0; j < n.k; ++j) {
            const int64_t pair = t * n.k + j;
            if (index[pair] < 0 || index[pair] >= n.E) continue;  // no expert
            const float share = weights[pair];
            const T* row = results + pair * n.D;
            for (int64_t d = 0; d < n.D; ++d) sum[static_cast<size_t>(d)] += to_float(row[d]) * share;
        }
        for (int64_t d = 0; d < n.D; d += W) {
            const int64_t count = std::min<int64_t>(W, n.D - d);
            store_n(out + t * n.D + d, load_n(sum.data() + d, count), count);
        }
    });
}

template <class T>
void experts(T* out, const T* x, const int64_t* index, const float* weights, const MegptExpertsSizes& n) {
    const int64_t pairs = n.T * n.k;
    std::vector<std::vector<int64_t>> chosen(static_cast<size_t>(n.E));
    for (int64_t pair = 0; pair < pairs; ++pair)
        if (index[pair] >= 0 && index[pair] < n.E) chosen[static_cast<size_t>(index[pair])].push_back(pair);
    int64_t most = 0;
    for (const auto& c : chosen) most = std::max<int64_t>(most, static_cast<int64_t>(c.size()));
    const auto elements = [](int64_t count) { return static_cast<size_t>(count); };
    std::vector<T> rows(elements(most * n.D)), both(elements(most * 2 * n.I)), inner(elements(most * n.I));
    std::vector<T> some(elements(most * n.D)), results(elements(pairs * n.D));
    const size_t bytes = elements(n.D) * sizeof(T);
    for (int64_t e = 0; e < n.E; ++e) {
        const auto& c = chosen[static_cast<size_t>(e)];
        const int64_t count = static_cast<int64_t>(c.size());
        if (count == 0) continue;
        for (int64_t i = 0; i < count; ++i) std::memcpy(&rows[elements(i * n.D)], x + c[elements(i)] / n.k * n.D, bytes);
        multiply(both.data(), rows.data(), n.gate_up, e, count, 2 * n.I, n.D, n.dtype, n.threads);
        megpt_gated(inner.data(), both.data(), both.data() + n.I, count, n.I, 2 * n.I, 2 * n.I, n.activation, n.dtype,
                    n.threads);
        multiply(some.data(), inner.data(), n.down, e, count, n.D, n.I, n.dtype, n.threads);
        for (int64_t i = 0; i < count; ++i) std::memcpy(&results[elements(c[elements(i)] * n.D)], &some[elements(i * n.D)], bytes);
    }
    weighted_sum(out, results.data(), weights, index, n);
}

}  // namespace
}  // namespace megpt

// out and x [T, D] contiguous, float32 or bfloat16; index [T, k] int64 (beyond E: no expert), weights [T, k] float32.
MEGPT_EXPORT void megpt_experts(void* out, const void* x, const int64_t* index, const float* weights,
                                const MegptExpertsSizes* n) {
    using megpt::bf16;
    if (n->dtype == megpt::kBFloat16)
        megpt::experts(static_cast<bf16*>(out), static_cast<const bf16*>(x), index, weights, *n);
    else
        megpt::experts(static_cast<float*>(out), static_cast<const float*>(x), index, weights, *n);
}
