// Work for several threads: those of XLA, and none besides.

#ifndef QWIX_CPU_THREADS_H_
#define QWIX_CPU_THREADS_H_

#include <algorithm>
#include <atomic>
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

// Runs fn(item) for all items, on this thread and those of XLA's pool that are free.
//
// This thread takes items as the others do, and then waits for none but those that were taken. So it does not
// depend on a free thread in the pool, of which it is most often itself one. A helper that comes late finds
// nothing to do, but has to find out, hence the shared state.
template <class Fn>
void parallel_for(ffi::ThreadPool& pool, int64_t workers, int64_t items, Fn fn) {
  if (workers <= 1 || items <= 1) {
    HonourDenormals scope;
    for (int64_t i = 0; i < items; ++i) fn(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto work = [items](State& shared, const Fn& body) {
    HonourDenormals scope;
    int64_t count = 0;
    for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < items; ++count) body(i);
    shared.done.fetch_add(count, std::memory_order_release);
  };
  for (int64_t i = 1; i < std::min(workers, items); ++i) {
    pool.Schedule([state, work, &fn, items] {
      // `fn` lives as long as items are left or unfinished.
      if (state->next.load(std::memory_order_relaxed) < items) work(*state, fn);
    });
  }
  work(*state, fn);
  for (int spins = 0; state->done.load(std::memory_order_acquire) < items; ++spins) {
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
