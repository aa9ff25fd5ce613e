// Calls of this library done again in their order, with no other code between them.
//
// Invariant: each call does what it did when it was recorded, on what its addresses hold now.

#include <cstring>

#include "parallel.h"
#include "simd.h"

struct MegptAttentionSizes;
struct MegptWriteSizes;
struct MegptExpertsSizes;

MEGPT_EXPORT void megpt_linear(void*, const void*, const void*, const void*, int64_t, int64_t, int64_t, int64_t,
                               int64_t, int64_t);
MEGPT_EXPORT void megpt_quantized_linear(void*, const void*, const void*, const void*, const void*, const void*,
                                         const void*, float);
MEGPT_EXPORT void megpt_rms_norm(void*, const void*, const void*, int64_t, int64_t, int64_t, float, int64_t,
                                 int64_t, int64_t);
MEGPT_EXPORT void megpt_gated(void*, const void*, const void*, int64_t, int64_t, int64_t, int64_t, int64_t,
                              int64_t, int64_t);
MEGPT_EXPORT void megpt_rope(void*, const void*, const void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                             int64_t);
MEGPT_EXPORT void megpt_write_kv(void*, void*, float*, float*, const void*, const void*, const int64_t*,
                                 const MegptWriteSizes*);
MEGPT_EXPORT void megpt_attention(void*, const void*, const void*, const void*, const float*, const float*,
                                  const int32_t*, const int32_t*, const int32_t*, const float*, const float*,
                                  const MegptAttentionSizes*, float, float);

MEGPT_EXPORT void megpt_experts(void*, const void*, const int64_t*, const float*, const MegptExpertsSizes*);

// replay.py has the same order. n: addresses and whole numbers, as the function takes them; x: its floats.
extern "C" struct MegptCall {
    int64_t function;
    int64_t n[12];
    float x[2];
};

namespace megpt {
namespace {

enum Function : int64_t { kLinear, kQuantizedLinear, kRmsNorm, kGated, kRope, kWriteKv, kAttention, kAdd, kCopy, kExperts };

template <class T>
void add_all(T* out, const T* a, const T* b, int64_t count) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(out + i, add(load(a + i), load(b + i)));
    if (i < count) store_n(out + i, add(load_n(a + i, count - i), load_n(b + i, count - i)), count - i);
}

template <class P>
P at(int64_t address) { return reinterpret_cast<P>(address); }

}  // namespace
}  // namespace megpt

// out = a + b for `count` numbers, rounded to their dtype.
MEGPT_EXPORT void megpt_add(void* out, const void* a, const void* b, int64_t count, int64_t dtype) {
    using megpt::bf16;
    if (dtype == megpt::kBFloat16)
        megpt::add_all(static_cast<bf16*>(out), static_cast<const bf16*>(a), static_cast<const bf16*>(b), count);
    else
        megpt::add_all(static_cast<float*>(out), static_cast<const float*>(a), static_cast<const float*>(b), count);
}

MEGPT_EXPORT void megpt_replay(const MegptCall* calls, int64_t count) {
    using megpt::at;
    using out = void*;
    using in = const void*;
    using floats = float*;
    for (const MegptCall* c = calls; c < calls + count; ++c) {
        const int64_t* n = c->n;
        switch (c->function) {
            case megpt::kLinear:
                megpt_linear(at<out>(n[0]), at<in>(n[1]), at<in>(n[2]), at<in>(n[3]), n[4], n[5], n[6], n[7], n[8], n[9]);
                break;
            case megpt::kQuantizedLinear:
                megpt_quantized_linear(at<out>(n[0]), at<in>(n[1]), at<in>(n[2]), at<in>(n[3]), at<in>(n[4]), at<in>(n[5]),
                                       at<in>(n[6]), c->x[0]);
                break;
            case megpt::kRmsNorm:
                megpt_rms_norm(at<out>(n[0]), at<in>(n[1]), at<in>(n[2]), n[3], n[4], n[5], c->x[0], n[6], n[7], n[8]);
                break;
            case megpt::kGated:
                megpt_gated(at<out>(n[0]), at<in>(n[1]), at<in>(n[2]), n[3], n[4], n[5], n[6], n[7], n[8], n[9]);
                break;
            case megpt::kRope:
                megpt_rope(at<out>(n[0]), at<in>(n[1]), at<in>(n[2]), n[3], n[4], n[5], n[6], n[7], n[8], n[9]);
                break;
            case megpt::kWriteKv:
                megpt_write_kv(at<out>(n[0]), at<out>(n[1]), at<floats>(n[2]), at<floats>(n[3]), at<in>(n[4]), at<in>(n[5]),
                               at<const int64_t*>(n[6]), at<const MegptWriteSizes*>(n[7]));
                break;
            case megpt::kAttention:
                megpt_attention(at<out>(n[0]), at<in>(n[1]), at<in>(n[2]), at<in>(n[3]), at<floats>(n[4]), at<floats>(n[5]),
                                at<const int32_t*>(n[6]), at<const int32_t*>(n[7]), at<const int32_t*>(n[8]),
                                at<floats>(n[9]), at<floats>(n[10]), at<const MegptAttentionSizes*>(n[11]), c->x[0],
                                c->x[1]);
                break;
            case megpt::kAdd:
                megpt_add(at<out>(n[0]), at<in>(n[1]), at<in>(n[2]), n[3], n[4]);
                break;
            case megpt::kCopy:
                std::memcpy(at<out>(n[0]), at<in>(n[1]), static_cast<size_t>(n[2]));
                break;
            case megpt::kExperts:
                megpt_experts(at<out>(n[0]), at<in>(n[1]), at<const int64_t*>(n[2]), at<floats>(n[3]),
                              at<const MegptExpertsSizes*>(n[4]));
                break;
        }
    }
}
