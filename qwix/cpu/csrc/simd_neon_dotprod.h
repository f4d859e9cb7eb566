// The vector layer on NEON with the byte dot product (Armv8.2 dotprod): see simd_portable.h for what each name means. A
// number of each column of a block takes four registers.

#if defined(QWIX_EMULATED)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/arm/neon.h>
#else
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>

#include "job.h"

namespace qwix {
namespace {

struct Simd {
  static constexpr const char* kName = "neon_dotprod";
  static constexpr int kRows = 6;
  static constexpr int kFewRows = 4;
  static constexpr int kPanelRows = 6;

  template <class T>
  struct Four { T a, b, c, d; };
  struct Floats : Four<float32x4_t> {};
  struct Ints : Four<int32x4_t> {};
  struct Bytes : Four<uint8x16_t> {};

  // fn of each register of the operands.
  template <class Out, class Fn, class... In>
  static Out each(Fn fn, const In&... x) {
    return {{fn(x.a...), fn(x.b...), fn(x.c...), fn(x.d...)}};
  }

  static Floats fset(float v) {
    const float32x4_t x = vdupq_n_f32(v);
    return {{x, x, x, x}};
  }
  static Floats fload(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
  static void fstore(float* p, Floats x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
  }
  static Floats fload_bf16(const uint16_t* p) {
    auto four = [](const uint16_t* q) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(q)), 16)); };
    return {{four(p), four(p + 4), four(p + 8), four(p + 12)}};
  }
  static Floats fload_f16(const uint16_t* p) {
    auto four = [](const uint16_t* q) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(q))); };
    return {{four(p), four(p + 4), four(p + 8), four(p + 12)}};
  }
  static Floats fma(Floats x, Floats y, Floats z) {
    return each<Floats>([](auto i, auto j, auto k) { return vfmaq_f32(k, i, j); }, x, y, z);
  }
  static Floats fmul(Floats x, Floats y) {
    return each<Floats>([](auto i, auto j) { return vmulq_f32(i, j); }, x, y);
  }
  static Floats fadd(Floats x, Floats y) {
    return each<Floats>([](auto i, auto j) { return vaddq_f32(i, j); }, x, y);
  }
  static Floats fsub(Floats x, Floats y) {
    return each<Floats>([](auto i, auto j) { return vsubq_f32(i, j); }, x, y);
  }
  static float fsum(Floats x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.a, x.b), vaddq_f32(x.c, x.d))); }
  static Floats fmax(Floats x, Floats y) {
    return each<Floats>([](auto i, auto j) { return vbslq_f32(vcgtq_f32(i, j), i, j); }, x, y);
  }
  static Floats fclamp(Floats x, float low, float high) {
    const float32x4_t l = vdupq_n_f32(low), h = vdupq_n_f32(high);
    return each<Floats>([&](auto i) { return vminq_f32(vmaxq_f32(i, l), h); }, x);
  }

  static Ints iset(int32_t v) {
    const int32x4_t x = vdupq_n_s32(v);
    return {{x, x, x, x}};
  }
  static Ints iload(const int32_t* p) { return {{vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}}; }
  static void istore(int32_t* p, Ints x) {
    vst1q_s32(p, x.a);
    vst1q_s32(p + 4, x.b);
    vst1q_s32(p + 8, x.c);
    vst1q_s32(p + 12, x.d);
  }
  static Ints iload_u8(const uint8_t* p) {
    const uint8x16_t v = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(v)), high = vmovl_u8(vget_high_u8(v));
    auto wide = [](uint16x4_t x) { return vreinterpretq_s32_u32(vmovl_u16(x)); };
    return {{wide(vget_low_u16(low)), wide(vget_high_u16(low)), wide(vget_low_u16(high)), wide(vget_high_u16(high))}};
  }
  static Ints iload_s8(const int8_t* p) {
    const int8x16_t v = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_s8(vget_high_s8(v));
    return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
             vmovl_s16(vget_high_s16(high))}};
  }
  static Ints iadd(Ints x, Ints y) {
    return each<Ints>([](auto i, auto j) { return vaddq_s32(i, j); }, x, y);
  }
  static Ints isub(Ints x, Ints y) {
    return each<Ints>([](auto i, auto j) { return vsubq_s32(i, j); }, x, y);
  }
  static Ints imul(Ints x, Ints y) {
    return each<Ints>([](auto i, auto j) { return vmulq_s32(i, j); }, x, y);
  }
  static Ints imax(Ints x, Ints y) {
    return each<Ints>([](auto i, auto j) { return vmaxq_s32(i, j); }, x, y);
  }
  static Ints magnitude_bits(Floats x) {
    const int32x4_t mask = vdupq_n_s32(0x7fffffff);
    return each<Ints>([&](auto i) { return vandq_s32(vreinterpretq_s32_f32(i), mask); }, x);
  }
  static Floats to_float(Ints x) {
    return each<Floats>([](auto i) { return vcvtq_f32_s32(i); }, x);
  }
  static Ints round(Floats x) {
    return each<Ints>([](auto i) { return vcvtq_s32_f32(vrndnq_f32(i)); }, x);
  }

  static void store_codes(char* p, Ints x) {
    auto narrow = [](int32x4_t i, int32x4_t j) { return vqmovn_s16(vcombine_s16(vqmovn_s32(i), vqmovn_s32(j))); };
    vst1q_s8(reinterpret_cast<int8_t*>(p), vcombine_s8(narrow(x.a, x.b), narrow(x.c, x.d)));
  }

  static Bytes load_bytes(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
  static void store_bytes(uint8_t* p, Bytes x) {
    vst1q_u8(p, x.a);
    vst1q_u8(p + 16, x.b);
    vst1q_u8(p + 32, x.c);
    vst1q_u8(p + 48, x.d);
  }
  static Bytes low_nibbles(Bytes x) {
    return each<Bytes>([](auto i) { return vandq_u8(i, vdupq_n_u8(15)); }, x);
  }
  static Bytes high_nibbles(Bytes x) {
    return each<Bytes>([](auto i) { return vshrq_n_u8(i, 4); }, x);
  }
  static Bytes lookup(const int8_t (&table)[16], Bytes nibbles) {
    const uint8x16_t t = vreinterpretq_u8_s8(vld1q_s8(table));
    return each<Bytes>([&](auto i) { return vqtbl1q_u8(t, i); }, nibbles);
  }
  static Bytes flip(Bytes x, uint8_t bits) {
    return each<Bytes>([&](auto i) { return veorq_u8(i, vdupq_n_u8(bits)); }, x);
  }
  template <int kShift, int kWidth>
  static Ints field(Bytes x) {
    return each<Ints>(
        [](uint8x16_t i) {
          int32x4_t v = vreinterpretq_s32_u8(i);
          if constexpr (kShift + kWidth < 32) v = vshlq_n_s32(v, 32 - kShift - kWidth);
          return vshrq_n_s32(v, 32 - kWidth);
        },
        x);
  }
  template <int kShift>
  static Floats field_lookup(const float (&table)[16], Bytes x) {
    const uint8_t* p = reinterpret_cast<const uint8_t*>(table);
    const uint8x16x4_t bytes = {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
    return each<Floats>(
        [&](uint8x16_t i) {
          uint32x4_t v = vreinterpretq_u32_u8(i);
          if constexpr (kShift > 0) v = vshrq_n_u32(v, kShift);
          // The index of each of the four bytes of a float.
          v = vmlaq_n_u32(vdupq_n_u32(0x03020100), vandq_u32(v, vdupq_n_u32(15)), 0x04040404);
          return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(v)));
        },
        x);
  }
  template <Format kFormat>
  static Floats fp8(Ints x) {
    constexpr bool kE4 = kFormat == kE4M3;
    return each<Floats>(
        [](int32x4_t i) {
          const int32x4_t magnitude = vandq_s32(i, vdupq_n_s32(0x7f)), sign = vandq_s32(i, vdupq_n_s32(INT32_MIN));
          const uint32x4_t is_special = vcgtq_s32(magnitude, vdupq_n_s32(kE4 ? 0x7e : 0x7b));
          const int32x4_t special = vandq_s32(vreinterpretq_s32_u32(is_special), vdupq_n_s32(kE4 ? -1 : 0x7f800000));
          const int32x4_t bits = vorrq_s32(vorrq_s32(vshlq_n_s32(magnitude, kE4 ? 20 : 21), special), sign);
          return vmulq_f32(vreinterpretq_f32_s32(bits), vdupq_n_f32(kE4 ? 0x1p120f : 0x1p112f));
        },
        x);
  }

  static constexpr bool kFiniteFp8 = false;
  static constexpr bool kFourK = false;
  static constexpr bool kFastLookup = false;

  // The instruction multiplies signed bytes: full codes have 128 taken off.
  template <bool kFull>
  struct Dot {
    static constexpr int64_t kGroupBytes = 4;
    static constexpr bool kSaturates = false;
    static constexpr int kChains = 2;  // a row has four
    static constexpr int32_t kOffset = kFull ? 128 : 0;
    static constexpr int64_t kFlushGroups = INT64_MAX / 8;
    using Partial = Ints;
    static Partial zero() { return iset(0); }
    static void add(Partial& p, Bytes codes, const char* act) {
      int32_t group;
      std::memcpy(&group, act, 4);
      const int8x16_t g = vreinterpretq_s8_s32(vdupq_n_s32(group));
      if constexpr (kFull) codes = flip(codes, 0x80);
      p = each<Ints>([&](auto sum, auto code) { return vdotq_s32(sum, vreinterpretq_s8_u8(code), g); }, p, codes);
    }
    static Ints sums(Partial p) { return p; }
  };
};

}  // namespace
}  // namespace qwix
