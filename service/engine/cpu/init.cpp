// The instruction set and the threads of this process.
#include "common.h"

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <pthread.h>
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

Isa isa = SCALAR;
int n_threads = 1;

namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel = nullptr;

#if defined(__x86_64__)
// Linux lends the tiles' registers only to who asks (arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool tiles_are_lent() {
#if defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}

// CPUID.(7,0).EDX: 22 amx-bf16, 24 amx-tile; CPUID.(7,1).EAX: 5 avx512_bf16. Compilers name them differently.
bool has_leaf7(int subleaf, int reg, int bit) {
    unsigned r[4] = {};
    asm volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(7), "c"(subleaf));
    return r[reg] >> bit & 1;
}

Isa best() {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return SCALAR;
    for (auto bit : {16, 17, 30, 31}) // avx512f, dq, bw, vl
        if (!__builtin_cpu_supports("avx512f") || !has_leaf7(0, 1, bit)) return AVX2;
    if (!has_leaf7(1, 0, 5)) return AVX512;
    return has_leaf7(0, 3, 22) && has_leaf7(0, 3, 24) && tiles_are_lent() ? AMX : AVX512_BF16;
}
#elif defined(__aarch64__)
Isa best() { return NEON; }
#else
Isa best() { return SCALAR; }
#endif

// For where torch brings no GNU OpenMP: threads that sleep between two pieces of work.
class Pool {
  public:
    explicit Pool(int helpers) {
        try {
            for (; helpers_ < helpers; ++helpers_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {  // the system gives no more: those that there are do the work
        }
    }

    int helpers() const { return helpers_; }

    // A second caller at the same time works alone: no thread waits for another's work.
    void run(void (*work)(void*), void* data) {
        if (taken_.test_and_set(std::memory_order_acquire)) return work(data);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            work_ = work, data_ = data, busy_ = helpers_, ++turn_;
        }
        start_.notify_all();
        work(data);
        {
            std::unique_lock<std::mutex> lock(mutex_);
            done_.wait(lock, [this] { return busy_ == 0; });
        }
        taken_.clear(std::memory_order_release);
    }

  private:
    void serve() {
        for (uint64_t seen = 0;;) {
            std::unique_lock<std::mutex> lock(mutex_);
            start_.wait(lock, [&] { return turn_ != seen; });
            seen = turn_;
            auto work = work_;
            auto data = data_;
            lock.unlock();
            work(data);
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
    std::mutex mutex_;
    std::condition_variable start_, done_;
    void (*work_)(void*) = nullptr;
    void* data_ = nullptr;
    int helpers_ = 0, busy_ = 0;
    uint64_t turn_ = 0;
};

Pool* pool = nullptr;  // never deleted: its threads have no end

}  // namespace

void run_threads(void (*work)(void*), void* data) {
    gomp_parallel ? gomp_parallel(work, data, unsigned(n_threads), 0) : pool->run(work, data);
}

// `wanted`: an Isa that must not be exceeded, -1 for the best there is. `parallel`: libgomp's GOMP_parallel as
// torch has loaded it, so that both share their threads and none waits for a core; or null. Gives the Isa.
extern "C" int snug_init(int wanted, int threads, void* parallel) {
    const Isa found = best();
    isa = wanted >= 0 && wanted < found ? Isa(wanted) : found;
    if (isa == NEON && found != NEON) isa = SCALAR;  // of the other architecture
    n_threads = threads < 1 ? 1 : threads;
    gomp_parallel = reinterpret_cast<GompParallel>(parallel);
    if (!gomp_parallel && n_threads > 1 && !(pool && pool->helpers() == n_threads - 1)) pool = new Pool(n_threads - 1);
    // After a fork the child has one thread, and neither pool would notice that its others are gone.
    static const int once = pthread_atfork(nullptr, nullptr, [] { n_threads = 1; });
    (void)once;
    return isa;
}
