// Store new keys and values in the paged cache, quantizing to int8 when the cache is int8.
//
// Letters: T tokens, Hkv KV heads, D head size. A slot is block * BS + offset: the cache [N, BS, Hkv, D] is
// [slots, Hkv, D] to a writer.

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace megpt {
namespace {

// x = scale * q with scale = max|x| / 127, q to the nearest, ties to even; a row of zeros has scale 0.
template <class T>
float quantize_row(int8_t* out, const T* x, int64_t D) {
    Vf largest = zero();
    for (int64_t d = 0; d < D; d += W) largest = max(largest, abs(d + W <= D ? load(x + d) : load_n(x + d, D - d)));
    const float scale = reduce_max(largest) / 127.0f;
    const Vf divisor = set1(scale == 0.0f ? 1.0f : scale);
    for (int64_t d = 0; d < D; d += W) {
        const int64_t n = std::min<int64_t>(W, D - d);
        store_n(out + d, div(load_n(x + d, n), divisor), n);
    }
    return scale;
}

template <class From, class To>
void copy_row(To* out, const From* x, int64_t D) {
    if constexpr (sizeof(From) == sizeof(To)) {
        std::memcpy(out, x, static_cast<size_t>(D) * sizeof(To));
    } else {
        for (int64_t d = 0; d < D; d += W) {
            const int64_t n = std::min<int64_t>(W, D - d);
            store_n(out + d, load_n(x + d, n), n);
        }
    }
}

struct Rows {
    void* cache;         // [slots, Hkv, D]
    float* scales;       // [slots, Hkv], int8 only
    const void* x;       // [T, Hkv, D] with strides
    int64_t D, stride_t, stride_h;
};

template <class From>
void write_token(const Rows& rows, int64_t dtype, int64_t Hkv, int64_t token, int64_t slot) {
    for (int64_t h = 0; h < Hkv; ++h) {
        const From* x = static_cast<const From*>(rows.x) + token * rows.stride_t + h * rows.stride_h;
        const int64_t row = slot * Hkv + h, at = row * rows.D;
        if (dtype == kInt8)
            rows.scales[row] = quantize_row(static_cast<int8_t*>(rows.cache) + at, x, rows.D);
        else if (dtype == kBFloat16)
            copy_row(static_cast<bf16*>(rows.cache) + at, x, rows.D);
        else
            copy_row(static_cast<float*>(rows.cache) + at, x, rows.D);
    }
}

}  // namespace
}  // namespace megpt

// Integers of a call, in this order. Strides are in elements.
struct MegptWriteSizes {
    int64_t T, Hkv, Dk, Dv, key_stride_t, key_stride_h, value_stride_t, value_stride_h;
    int64_t source_dtype, cache_dtype, threads;
};

// slots [T] int64; key [T, Hkv, Dk] and value [T, Hkv, Dv] of source_dtype (float32 or bfloat16).
MEGPT_EXPORT void megpt_write_kv(void* keys, void* values, float* key_scales, float* value_scales, const void* key,
                                 const void* value, const int64_t* slots, const MegptWriteSizes* n) {
    const megpt::Rows sources[2] = {
        {keys, key_scales, key, n->Dk, n->key_stride_t, n->key_stride_h},
        {values, value_scales, value, n->Dv, n->value_stride_t, n->value_stride_h},
    };
    const double elements = static_cast<double>(n->T * n->Hkv * (n->Dk + n->Dv));
    const int team = megpt::useful_threads(n->threads, elements / 2e3);
    const int64_t chunk = 32, items = megpt::ceil_div(n->T, chunk);
    megpt::parallel_for(items, team, [&](int64_t item) {
        for (int64_t token = item * chunk; token < std::min(n->T, (item + 1) * chunk); ++token)
            for (const megpt::Rows& rows : sources) {
                if (n->source_dtype == megpt::kBFloat16)
                    megpt::write_token<megpt::bf16>(rows, n->cache_dtype, n->Hkv, token, slots[token]);
                else
                    megpt::write_token<float>(rows, n->cache_dtype, n->Hkv, token, slots[token]);
            }
    });
}
