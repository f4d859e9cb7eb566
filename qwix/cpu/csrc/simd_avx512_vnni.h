// The vector layer on AVX-512 (F, BW, VL) with VNNI: see simd_portable.h for what each name means. A register holds
// a number of each column of a block.

#include "intrinsics_x86.h"

#include <cstdint>
#include <cstring>

#include "job.h"

namespace qwix {
namespace {

struct Simd {
  static constexpr const char* kName = "avx512_vnni";
  // A multiplication takes a register of weights and an activation from memory, broadcast by the instruction itself; as
  // two loads go with two multiplications, more columns at once would save nothing.
  static constexpr int kRows = 16;
  static constexpr int kFewRows = 8;
  static constexpr int kPanelRows = 16;

  struct Floats { __m512 v; };
  struct Ints { __m512i v; };
  struct Bytes { __m512i v; };

  static Floats fset(float v) { return {_mm512_set1_ps(v)}; }
  static Floats fload(const float* p) { return {_mm512_loadu_ps(p)}; }
  static void fstore(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
  static __m256i halves(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Floats fload_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves(p)), 16))};
  }
  static Floats fload_f16(const uint16_t* p) { return {_mm512_cvtph_ps(halves(p))}; }
  static Floats fma(Floats x, Floats y, Floats z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
  static Floats fmul(Floats x, Floats y) { return {_mm512_mul_ps(x.v, y.v)}; }
  static Floats fadd(Floats x, Floats y) { return {_mm512_add_ps(x.v, y.v)}; }
  static Floats fsub(Floats x, Floats y) { return {_mm512_sub_ps(x.v, y.v)}; }
  static float fsum(Floats x) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m256 v = _mm256_add_ps(_mm256_castsi256_ps(_mm512_castsi512_si256(bits)),
                                   _mm256_castsi256_ps(_mm512_extracti64x4_epi64(bits, 1)));
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
  }
  static Floats fmax(Floats x, Floats y) { return {_mm512_max_ps(x.v, y.v)}; }
  static Floats fclamp(Floats x, float low, float high) {
    return {_mm512_min_ps(_mm512_max_ps(x.v, _mm512_set1_ps(low)), _mm512_set1_ps(high))};
  }

  static Ints iset(int32_t v) { return {_mm512_set1_epi32(v)}; }
  static Ints iload(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  static void istore(int32_t* p, Ints x) { _mm512_storeu_si512(p, x.v); }
  static Ints iload_u8(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static Ints iload_s8(const int8_t* p) {
    return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static Ints iadd(Ints x, Ints y) { return {_mm512_add_epi32(x.v, y.v)}; }
  static Ints isub(Ints x, Ints y) { return {_mm512_sub_epi32(x.v, y.v)}; }
  static Ints imul(Ints x, Ints y) { return {_mm512_mullo_epi32(x.v, y.v)}; }
  static Ints imax(Ints x, Ints y) { return {_mm512_max_epi32(x.v, y.v)}; }
  static Ints magnitude_bits(Floats x) {
    return {_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff))};
  }
  static Floats to_float(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
  static Ints round(Floats x) { return {_mm512_cvtps_epi32(x.v)}; }

  static void store_codes(char* p, Ints x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x.v));
  }

  static Bytes load_bytes(const uint8_t* p) {
    __m512i v = _mm512_loadu_si512(p);
#if !defined(QWIX_EMULATED)
    // Once, and not by each instruction that uses it, as GCC 12 would have it: a load takes a cycle.
    __asm__("" : "+v"(v));
#endif
    return {v};
  }
  static void store_bytes(uint8_t* p, Bytes x) { _mm512_storeu_si512(p, x.v); }
  static Bytes low_nibbles(Bytes x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
  static Bytes high_nibbles(Bytes x) {
    return {_mm512_and_si512(_mm512_srli_epi16(x.v, 4), _mm512_set1_epi8(15))};
  }
  static Bytes lookup(const int8_t (&table)[16], Bytes nibbles) {
    const __m512i t = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm512_shuffle_epi8(t, nibbles.v)};
  }
  static Bytes flip(Bytes x, uint8_t bits) {
    return {_mm512_xor_si512(x.v, _mm512_set1_epi8(static_cast<char>(bits)))};
  }
  template <int kShift, int kWidth>
  static Ints field(Bytes x) {
    return {_mm512_srai_epi32(_mm512_slli_epi32(x.v, 32 - kShift - kWidth), 32 - kWidth)};
  }
  template <int kShift>
  static Floats field_lookup(const float (&table)[16], Bytes x) {
    // Only the low 4 bits of an index count.
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(x.v, kShift), _mm512_loadu_ps(table))};
  }
  template <Format kFormat>
  static Floats fp8(Ints x) {
    constexpr bool kE4 = kFormat == kE4M3;
    const __m512i magnitude = _mm512_and_si512(x.v, _mm512_set1_epi32(0x7f));
    const __m512i sign = _mm512_and_si512(x.v, _mm512_set1_epi32(INT32_MIN));
    const __m512i bits = _mm512_or_si512(_mm512_slli_epi32(magnitude, kE4 ? 20 : 21), sign);
    const __mmask16 special = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(kE4 ? 0x7e : 0x7b));
    const __m512i ones = _mm512_set1_epi32(kE4 ? -1 : 0x7f800000);
    const __m512i all = _mm512_mask_or_epi32(bits, special, bits, ones);
    return {_mm512_mul_ps(_mm512_castsi512_ps(all), _mm512_set1_ps(kE4 ? 0x1p120f : 0x1p112f))};
  }

  static constexpr bool kFiniteFp8 = true;
  template <Format kFormat>
  static bool is_finite(Bytes x) {
    const __m512i special = _mm512_set1_epi8(kFormat == kE4M3 ? 0x7f : 0x7c);
    return _mm512_cmpeq_epi8_mask(_mm512_and_si512(x.v, special), special) == 0;
  }
  template <Format kFormat, int kShift>
  static Floats fp8_finite(Bytes x) {
    constexpr bool kE4 = kFormat == kE4M3;
    const __m512i top = kShift == 24 ? x.v : _mm512_slli_epi32(x.v, 24 - kShift);
    const __m512i bits = _mm512_and_si512(_mm512_srai_epi32(top, kE4 ? 4 : 3), _mm512_set1_epi32(kE4 ? 0x87f00000 : 0x8fe00000));
    return {_mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(kE4 ? 0x1p120f : 0x1p112f))};
  }
  static constexpr bool kFourK = false;
  static constexpr bool kFastLookup = true;

  template <bool kFull>
  struct Dot {
    static constexpr int64_t kGroupBytes = 4;
    static constexpr bool kSaturates = false;
    static constexpr int kChains = 8;  // vpdpbusd takes 4 or 5 cycles; two begin in one
    static constexpr int32_t kOffset = 0;
    static constexpr int64_t kFlushGroups = INT64_MAX / 8;
    using Partial = Ints;
    static Partial zero() { return iset(0); }
    static void add(Partial& p, Bytes codes, const char* act) {
#if defined(QWIX_EMULATED)
      int32_t group;
      std::memcpy(&group, act, 4);
      p.v = _mm512_dpbusd_epi32(p.v, codes.v, _mm512_set1_epi32(group));
#else
      // GCC 12 broadcasts by another instruction, and copies each sum to another register and back.
      using Group = char[4];
      __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(p.v) : "v"(codes.v), "m"(*reinterpret_cast<const Group*>(act)));
#endif
    }
    static Ints sums(Partial p) { return p; }
  };
};

}  // namespace
}  // namespace qwix
