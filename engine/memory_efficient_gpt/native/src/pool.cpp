// The threads that share out a kernel's work items.
//
// Purpose: run items on the caller's thread and on helpers. Does not know: what an item is. Invariant: a call
// returns when every item is done, without waiting for helpers that have not started: where another process
// holds a core, the caller does the work alone instead of waiting for a time slice, as OpenMP's barrier would.
// One call at a time has the helpers; another thread's call in the meantime runs its items by itself.
//
// Waiting threads look for news for a moment before they sleep: the calls of a step follow each other within
// microseconds, and waking a sleeping thread takes as long as a small matrix. An idle engine burns nothing.
//
// Helpers start on first use, so that a process may fork before; a fork after that starts its own.

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "parallel.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace megpt {
namespace {

struct Job {
    int64_t items;
    void (*body)(const void*, int64_t);
    const void* context;
    std::atomic<int64_t> next{0};

    void work() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, i);
    }
};

constexpr std::chrono::microseconds kPatience{60};

// Whether `done` came true within kPatience.
template <class Condition>
bool look_for(const Condition& done) {
    const auto start = std::chrono::steady_clock::now();
    do {
        for (int i = 0; i < 32; ++i) {
            if (done()) return true;
#if defined(__x86_64__) || defined(__i386__)
            _mm_pause();
#endif
        }
    } while (std::chrono::steady_clock::now() - start < kPatience);
    return false;
}

class Pool {
public:
    // False if the helpers are busy with another call.
    bool run(Job& job, int helpers) {
        bool asleep;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            if (job_ != nullptr || working_ != 0) return false;
            start(helpers);
            job_ = &job;
            seats_ = helpers;
            asleep = sleeping_ > 0;
        }
        if (asleep && helpers == 1) wake_.notify_one();
        if (asleep && helpers > 1) wake_.notify_all();
        job.work();
        {
            std::unique_lock<std::mutex> lock(mutex_);
            job_ = nullptr;
            seats_ = 0;
        }
        if (look_for([this] { return working_ == 0; })) return true;
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return working_ == 0; });
        return true;
    }

private:
    // Where the system has no more threads, those that there are do the work.
    void start(int helpers) {
        try {
            for (; started_ < helpers; ++started_) std::thread(&Pool::help, this).detach();
        } catch (const std::system_error&) {
        }
    }

    void help() {
        for (;;) {
            look_for([this] { return seats_ > 0; });
            std::unique_lock<std::mutex> lock(mutex_);
            ++sleeping_;
            wake_.wait(lock, [this] { return seats_ > 0; });
            --sleeping_;
            Job& job = *job_;
            --seats_;
            ++working_;
            lock.unlock();
            job.work();
            lock.lock();
            if (--working_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;  // guards what follows; the atomic ones may be looked at without it
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    std::atomic<int> seats_{0};    // helpers that may still join the job; 0 when there is none
    std::atomic<int> working_{0};  // helpers that joined and are not done
    int sleeping_ = 0;             // helpers that must be woken
    int started_ = 0;
};

// Never destroyed: helpers wait on it until the process ends. A forked child has no helpers and makes its own.
Pool* pool = nullptr;
std::once_flag handler;
std::mutex creation;

Pool& the_pool() {
    std::call_once(handler, [] { pthread_atfork(nullptr, nullptr, [] { pool = nullptr; }); });
    const std::lock_guard<std::mutex> lock(creation);
    if (pool == nullptr) pool = new Pool;
    return *pool;
}

}  // namespace

void run_items(int64_t items, int threads, void (*body)(const void*, int64_t), const void* context) {
    Job job{items, body, context};
    if (threads <= 1 || items <= 1 || !the_pool().run(job, threads - 1)) job.work();
}

}  // namespace megpt
