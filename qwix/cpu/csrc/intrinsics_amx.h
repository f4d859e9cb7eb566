// AMX's tile registers: eight of up to 16 rows of 64 bytes. Or, in a build that is only for tests
// (`make kernels-emulated`), the same in plain C++, after Intel's Software Developer's Manual, volume 2.

#ifndef QWIX_CPU_INTRINSICS_AMX_H_
#define QWIX_CPU_INTRINSICS_AMX_H_

#include <cstdint>
#include <cstring>

namespace qwix {
namespace {

struct TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

struct Tiles {
#if !defined(QWIX_EMULATED)
  // In assembly, as GCC 12 takes no template parameters for its intrinsics. It does not know of the memory that a
  // tile is loaded from: a fence stands between that and what is written there.
  static void configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
  static void release() { __asm__ volatile("tilerelease" ::: "memory"); }
  static void fence() { __asm__ volatile("" ::: "memory"); }
  template <int kTile>
  static void zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile)); }
  template <int kTile>
  static void load(const void* p, int64_t stride) {
    __asm__ volatile("tileloadd (%0, %1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile));
  }
  template <int kTile>
  static void store(void* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0, %1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
  }
  // C += A B: of bytes, four k in 32 bits, signed ones with unsigned or signed ones; of bfloat16, two.
  template <int kC, int kA, int kB>
  static void add_uint8() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
  template <int kC, int kA, int kB>
  static void add_int8() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
  template <int kC, int kA, int kB>
  static void add_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
#else
  struct State {
    TileConfig config;
    char data[8][16][64];
  };
  static State& state() {
    static thread_local State s;
    return s;
  }
  static void configure(const TileConfig& config) {
    state().config = config;
    std::memset(state().data, 0, sizeof(State::data));
  }
  static void release() {}
  static void fence() {}
  template <int kTile>
  static void zero() { std::memset(state().data[kTile], 0, sizeof(State::data[kTile])); }
  template <int kTile>
  static void load(const void* p, int64_t stride) {
    zero<kTile>();
    State& s = state();
    for (int r = 0; r < s.config.rows[kTile]; ++r) {
      std::memcpy(s.data[kTile][r], static_cast<const char*>(p) + r * stride, s.config.row_bytes[kTile]);
    }
  }
  template <int kTile>
  static void store(void* p, int64_t stride) {
    State& s = state();
    for (int r = 0; r < s.config.rows[kTile]; ++r) {
      std::memcpy(static_cast<char*>(p) + r * stride, s.data[kTile][r], s.config.row_bytes[kTile]);
    }
  }
  template <class Sum, int kC, int kA, int kB, class Fn>
  static void each(Fn fn) {
    State& s = state();
    for (int r = 0; r < s.config.rows[kC]; ++r) {
      for (int n = 0; n < s.config.row_bytes[kC] / 4; ++n) {
        Sum sum;
        std::memcpy(&sum, &s.data[kC][r][4 * n], 4);
        for (int k = 0; k < s.config.rows[kB]; ++k) sum = fn(sum, &s.data[kA][r][4 * k], &s.data[kB][k][4 * n]);
        std::memcpy(&s.data[kC][r][4 * n], &sum, 4);
      }
    }
  }
  template <class Code, int kC, int kA, int kB>
  static void add_bytes() {
    each<uint32_t, kC, kA, kB>([](uint32_t sum, const char* a, const char* b) {
      for (int i = 0; i < 4; ++i) {
        sum += static_cast<uint32_t>(static_cast<signed char>(a[i]) * static_cast<Code>(b[i]));
      }
      return sum;
    });
  }
  template <int kC, int kA, int kB>
  static void add_uint8() { add_bytes<unsigned char, kC, kA, kB>(); }
  template <int kC, int kA, int kB>
  static void add_int8() { add_bytes<signed char, kC, kA, kB>(); }
  template <int kC, int kA, int kB>
  static void add_bf16() {
    auto to_float = [](const char* p) {
      uint32_t bits = 0;
      std::memcpy(reinterpret_cast<char*>(&bits) + 2, p, 2);
      if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;  // denormals are zeros
      float f;
      std::memcpy(&f, &bits, 4);
      return f;
    };
    each<float, kC, kA, kB>([&](float sum, const char* a, const char* b) {
      for (int i = 0; i < 2; ++i) sum += to_float(a + 2 * i) * to_float(b + 2 * i);
      return sum;
    });
  }
#endif
};

}  // namespace
}  // namespace qwix

#endif  // QWIX_CPU_INTRINSICS_AMX_H_
