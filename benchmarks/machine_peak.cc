// What the machine can do at best, with as many threads as given: bytes read and products of int8 a second.
//
//     c++ -O3 -march=native -pthread machine_peak.cc -o machine_peak && ./machine_peak 2
//
// prints JSON. Bytes: a plain sum of an array of 512 MiB. Products: the instruction that multiplies the most bytes, and
// the addition that it needs, on registers: tdpbssd, vpdpbusd, sdot, or on AVX2 vpmaddubsw and vpaddw (an int8 product that must
// not saturate needs more than these two there, so nothing reaches this number).

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace {

// The shortest of some runs of fn(thread) on all threads, in seconds.
double seconds(int threads, int runs, const std::function<void(int)>& fn) {
  double best = 1e9;
  for (int run = 0; run < runs; ++run) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(fn, i);
    fn(0);
    for (auto& thread : others) thread.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

constexpr int64_t kRounds = 20'000'000;
constexpr int kSums = 10;  // independent of each other, to hide latency

#if defined(__AMX_INT8__) && defined(__linux__)
// Linux gives a process tile registers when it asks for them: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
bool has_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

constexpr int64_t kTileProducts = 16 * 16 * 64;

void multiply_tiles(int) {
  alignas(64) struct {
    uint8_t palette = 1, reserved[15] = {};
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config;
  for (int i = 0; i < 16; ++i) {
    config.row_bytes[i] = i < 8 ? 64 : 0;
    config.rows[i] = i < 8 ? 16 : 0;
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(config));  // the intrinsic does not tell the compiler that it reads all of it
  for (int64_t i = 0; i < kRounds; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
}
#endif

#if defined(__AVX512VNNI__)
using Vector = __m512i;
constexpr const char* kInstruction = "vpdpbusd, 64 products";
constexpr int64_t kProducts = 64;
Vector zero() { return _mm512_setzero_si512(); }
Vector add(Vector sum, Vector x, Vector y) { return _mm512_dpbusd_epi32(sum, x, y); }
#define QWIX_KEEP(v) __asm__ volatile("" : "+v"(v))
#elif defined(__AVX2__)
using Vector = __m256i;
constexpr const char* kInstruction = "vpmaddubsw and vpaddw, 32 products";
constexpr int64_t kProducts = 32;
Vector zero() { return _mm256_setzero_si256(); }
Vector add(Vector sum, Vector x, Vector y) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(x, y)); }
#define QWIX_KEEP(v) __asm__ volatile("" : "+x"(v))
#elif defined(__ARM_FEATURE_DOTPROD)
using Vector = int8x16_t;
constexpr const char* kInstruction = "sdot, 16 products";
constexpr int64_t kProducts = 16;
Vector zero() { return vdupq_n_s8(0); }
Vector add(Vector sum, Vector x, Vector y) {
  return vreinterpretq_s8_s32(vdotq_s32(vreinterpretq_s32_s8(sum), x, y));
}
#define QWIX_KEEP(v) __asm__ volatile("" : "+w"(v))
#endif

#if defined(QWIX_KEEP)
void multiply(int) {
  Vector sums[kSums], x = zero(), y = zero();
  for (Vector& sum : sums) sum = zero();
  QWIX_KEEP(y);
  for (int64_t i = 0; i < kRounds; ++i) {
    for (Vector& sum : sums) {
      QWIX_KEEP(x);  // or the product would be computed once
      sum = add(sum, x, y);
    }
  }
  for (Vector& sum : sums) QWIX_KEEP(sum);
}
#endif

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : static_cast<int>(std::thread::hardware_concurrency());
  std::vector<int64_t> data(size_t{64} << 20, 1);
  std::vector<int64_t> sums(static_cast<size_t>(threads) * 64);
  const size_t part = data.size() / static_cast<size_t>(threads);
  const double read = seconds(threads, 6, [&](int i) {
    const int64_t* p = data.data() + static_cast<size_t>(i) * part;
    int64_t sum = 0;
    for (size_t j = 0; j < part; ++j) sum += p[j];
    sums[static_cast<size_t>(i) * 64] = sum;
  });
  const double bytes = static_cast<double>(part) * threads * 8;
#if defined(QWIX_KEEP)
  const char* instruction = kInstruction;
  double products = static_cast<double>(kRounds) * kSums * kProducts * threads / seconds(threads, 3, multiply);
#if defined(__AMX_INT8__) && defined(__linux__)
  if (has_tiles()) {
    instruction = "tdpbssd, 16384 products";
    products = static_cast<double>(kRounds) * 4 * kTileProducts * threads / seconds(threads, 3, multiply_tiles);
  }
#endif
#else
  const char* instruction = "none known";
  const double products = 0;
#endif
  std::printf("{\"threads\": %d, \"read_gb_s\": %.2f, \"int8_gmac_s\": %.1f, \"instruction\": \"%s\", \"sum\": %ld}\n",
              threads, bytes / read / 1e9, products / 1e9, instruction, static_cast<long>(sums[0] % 2));
}
