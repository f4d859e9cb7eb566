// Work for several threads: those of XLA, and none besides.

#ifndef QWIX_CPU_THREADS_H_
#define QWIX_CPU_THREADS_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>

#include "job.h"
#include "xla/ffi/api/ffi.h"

#if defined(QWIX_X86)
#include <immintrin.h>
#endif

namespace qwix {

namespace ffi = xla::ffi;

// Honours denormals, which XLA's threads flush to zero: fp8 codes are read through them.
class HonourDenormals {
 public:
#if defined(QWIX_X86)
  HonourDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~HonourDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(QWIX_ARM)
  HonourDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    set(saved_ & ~(uint64_t{1} << 24));
  }
  ~HonourDenormals() { set(saved_); }

 private:
  static void set(uint64_t bits) { __asm__ volatile("msr fpcr, %0" : : "r"(bits)); }
  uint64_t saved_;
#endif
};

// Some items of work, and how far they are.
struct Work {
  int64_t items;
  void (*run)(const void* fn, int64_t item);
  const void* fn;  // lives as long as items are left or unfinished
  std::atomic<int64_t> next{0}, done{0};

  void take_part() {
    if (next.load(std::memory_order_relaxed) >= items) return;
    HonourDenormals scope;
    int64_t count = 0;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items; ++count) run(fn, i);
    done.fetch_add(count, std::memory_order_release);
  }
};

inline void pause() {
#if defined(QWIX_X86)
  _mm_pause();
#elif defined(QWIX_ARM)
  __asm__ volatile("yield");
#endif
}

// Where a thread of the pool that has helped waits a moment for more to do. A sleeping thread takes 50 microseconds
// and more to wake, as long as a layer of a small model takes; the next one most often comes sooner.
class Lingering {
 public:
  // Lets lingering threads take part in work, and says how many there are.
  int64_t offer(const std::shared_ptr<Work>& work) {
    lock();
    latest_ = work;
    unlock();
    version_.fetch_add(1);
    return threads_.load();
  }

  // Takes part in `work`, and in what is offered soon after.
  void help(std::shared_ptr<Work> work) {
    uint64_t seen = version_.load();
    for (;;) {
      work->take_part();
      threads_.fetch_add(1);
      const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(kMicroseconds);
      while (version_.load() == seen && std::chrono::steady_clock::now() < end) pause();
      threads_.fetch_sub(1);
      // Whoever has counted on this thread has changed the version before.
      const uint64_t version = version_.load();
      if (version == seen) return;
      seen = version;
      lock();
      work = latest_;
      unlock();
    }
  }

 private:
  static constexpr int kMicroseconds = 50;

  void lock() {
    while (busy_.test_and_set(std::memory_order_acquire)) pause();
  }
  void unlock() { busy_.clear(std::memory_order_release); }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::shared_ptr<Work> latest_;
  std::atomic<uint64_t> version_{0};
  std::atomic<int64_t> threads_{0};
};

inline Lingering lingering;

// Runs fn(item) for all items, on this thread and those of XLA's pool that are free.
//
// This thread takes items as the others do, and then waits for none but those that were taken. So it does not
// depend on a free thread in the pool, of which it is most often itself one. A helper that comes late finds
// nothing to do, but has to find out, hence the shared work.
template <class Fn>
void parallel_for(ffi::ThreadPool& pool, int64_t workers, int64_t items, Fn fn) {
  if (workers <= 1 || items <= 1) {
    HonourDenormals scope;
    for (int64_t i = 0; i < items; ++i) fn(i);
    return;
  }
  auto work = std::make_shared<Work>();
  work->items = items;
  work->run = [](const void* f, int64_t item) { (*static_cast<const Fn*>(f))(item); };
  work->fn = &fn;
  for (int64_t i = 1 + lingering.offer(work); i < std::min(workers, items); ++i) {
    pool.Schedule([work] { lingering.help(work); });
  }
  work->take_part();
  for (int spins = 0; work->done.load(std::memory_order_acquire) < items; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

// Memory of a thread, for what it works on.
inline char* workspace() {
  alignas(64) static thread_local char memory[kWorkspaceBytes];
  return memory;
}

}  // namespace qwix

#endif  // QWIX_CPU_THREADS_H_
