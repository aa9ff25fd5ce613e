// Work over threads, scratch memory, and what every exported function shares.
//
// Invariant: a kernel's result never depends on the thread count: threads share out whole work items.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#define MEGPT_EXPORT extern "C" __attribute__((visibility("default")))

namespace megpt {

// Element types in the C interface.
enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Threads for work that one of them would do in `microseconds`: waking a sleeping one takes 10 us or more, so
// each must have well more than that to do.
inline int useful_threads(int64_t threads, double microseconds) {
    const double wanted = 1.0 + microseconds / 40.0;
    return wanted < static_cast<double>(threads) ? static_cast<int>(wanted) : static_cast<int>(threads);
}

// body(context, item) for every item on up to `threads` threads; see pool.cpp.
void run_items(int64_t items, int threads, void (*body)(const void*, int64_t), const void* context);

// body(item) for every item; handed out one by one, since another process may hold one of the cores.
template <class Body>
inline void parallel_for(int64_t items, int threads, const Body& body) {
    if (threads <= 1 || items <= 1) {
        for (int64_t i = 0; i < items; ++i) body(i);
        return;
    }
    const auto call = [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); };
    run_items(items, threads, call, &body);
}

// Memory that is kept between calls and grows when needed; contents are undefined. Aligned to 64 bytes.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }

    void* reserve(size_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = (bytes + 4095) / 4096 * 4096;
            memory_ = std::aligned_alloc(64, size_);
            if (memory_ == nullptr) std::abort();
        }
        return memory_;
    }

private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

}  // namespace megpt
