// The vector layer on AVX2, FMA and F16C, and, where the including file defines QWIX_LAYER_AVX_VNNI, on the byte dot
// product of AVX-VNNI: see simd_portable.h for what each name means.

#include "intrinsics_x86.h"

#include <cstdint>
#include <cstring>

#include "job.h"

namespace qwix {
namespace {

struct Simd {
#if defined(QWIX_LAYER_AVX_VNNI)
  static constexpr const char* kName = "avx_vnni";
#else
  static constexpr const char* kName = "avx2";
#endif
  static constexpr int kRows = 4;
  static constexpr int kFewRows = 4;
  static constexpr int kPanelRows = 6;

  struct Floats { __m256 a, b; };
  struct Ints { __m256i a, b; };
  struct Bytes { __m256i a, b; };

  static Floats fset(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static Floats fload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void fstore(float* p, Floats v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
  }
  static Floats fload_bf16(const uint16_t* p) {
    auto half = [](const uint16_t* q) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
    };
    return {half(p), half(p + 8)};
  }
  static Floats fload_f16(const uint16_t* p) {
    auto half = [](const uint16_t* q) {
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
    };
    return {half(p), half(p + 8)};
  }
  static Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static Floats fmul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static Floats fadd(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static Floats fsub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static float fsum(Floats x) {
    const __m256 v = _mm256_add_ps(x.a, x.b);
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
  }
  static Floats fmax(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static Floats fclamp(Floats x, float low, float high) {
    const __m256 l = _mm256_set1_ps(low), h = _mm256_set1_ps(high);
    return {_mm256_min_ps(_mm256_max_ps(x.a, l), h), _mm256_min_ps(_mm256_max_ps(x.b, l), h)};
  }

  static Ints iset(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
  static Ints iload(const int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
  }
  static void istore(int32_t* p, Ints v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), v.b);
  }
  static Ints iload_u8(const uint8_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
  }
  static Ints iload_s8(const int8_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))};
  }
  static Ints iadd(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static Ints isub(Ints x, Ints y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
  static Ints imul(Ints x, Ints y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
  static Ints imax(Ints x, Ints y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
  static Ints magnitude_bits(Floats x) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    return {_mm256_and_si256(_mm256_castps_si256(x.a), mask), _mm256_and_si256(_mm256_castps_si256(x.b), mask)};
  }
  static Floats to_float(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
  static Ints round(Floats v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }

  static void store_codes(char* p, Ints v) {
    // packs works on halves of 128 bits: 0-3 8-11 | 4-7 12-15.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }

  static Bytes load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
  static void store_bytes(uint8_t* p, Bytes v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), v.b);
  }
  static Bytes low_nibbles(Bytes v) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)};
  }
  static Bytes high_nibbles(Bytes v) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(v.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(v.b, 4), mask)};
  }
  static Bytes lookup(const int8_t (&table)[16], Bytes nibbles) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(t, nibbles.a), _mm256_shuffle_epi8(t, nibbles.b)};
  }
  static Bytes flip(Bytes v, uint8_t bits) {
    const __m256i mask = _mm256_set1_epi8(static_cast<char>(bits));
    return {_mm256_xor_si256(v.a, mask), _mm256_xor_si256(v.b, mask)};
  }
  // Bits [shift, shift + width) of each column's 32, as a signed number.
  template <int kShift, int kWidth>
  static Ints field(Bytes v) {
    auto half = [](__m256i x) {
      if constexpr (kShift + kWidth < 32) x = _mm256_slli_epi32(x, 32 - kShift - kWidth);
      return _mm256_srai_epi32(x, 32 - kWidth);
    };
    return {half(v.a), half(v.b)};
  }
  // table[bits [shift, shift + 4) of each column's 32].
  template <int kShift>
  static Floats field_lookup(const float (&table)[16], Bytes v) {
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    auto half = [&](__m256i x) {
      const __m256i index = _mm256_srli_epi32(x, kShift);  // only its low 3 bits count
      const __m256 select = _mm256_castsi256_ps(_mm256_slli_epi32(x, 28 - kShift));
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), select);
    };
    return {half(v.a), half(v.b)};
  }
  // fp8 of the byte in the low 8 bits (sign-extended) as float. Relies on denormals being honoured.
  template <Format kFormat>
  static Floats fp8(Ints v) {
    auto half = [](__m256i x) {
      constexpr bool kE4 = kFormat == kE4M3;
      const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi32(0x7f));
      const __m256i sign = _mm256_and_si256(x, _mm256_set1_epi32(INT32_MIN));
      __m256i special = kE4 ? _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f))
                            : _mm256_and_si256(_mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7b)),
                                               _mm256_set1_epi32(0x7f800000));
      __m256i bits = _mm256_slli_epi32(magnitude, kE4 ? 20 : 21);
      bits = _mm256_or_si256(_mm256_or_si256(bits, special), sign);
      return _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(kE4 ? 0x1p120f : 0x1p112f));
    };
    return {half(v.a), half(v.b)};
  }

  static constexpr bool kFiniteFp8 = true;
  template <Format kFormat>
  static bool is_finite(Bytes v) {
    const __m256i mask = _mm256_set1_epi8(0x7f), most = _mm256_set1_epi8(kFormat == kE4M3 ? 0x7e : 0x7b);
    const __m256i a = _mm256_cmpgt_epi8(_mm256_and_si256(v.a, mask), most);
    const __m256i any = _mm256_or_si256(a, _mm256_cmpgt_epi8(_mm256_and_si256(v.b, mask), most));
    return _mm256_movemask_epi8(any) == 0;
  }
  // fp8 of bits [shift, shift + 8) of each column's 32, finite. Relies on denormals being honoured.
  template <Format kFormat, int kShift>
  static Floats fp8_finite(Bytes v) {
    auto half = [](__m256i x) {
      constexpr bool kE4 = kFormat == kE4M3;
      if constexpr (kShift < 24) x = _mm256_slli_epi32(x, 24 - kShift);
      const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(kE4 ? 0x87f00000u : 0x8fe00000u));
      const __m256i bits = _mm256_and_si256(_mm256_srai_epi32(x, kE4 ? 4 : 3), mask);
      return _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(kE4 ? 0x1p120f : 0x1p112f));
    };
    return {half(v.a), half(v.b)};
  }

  // Products of table[code] with one row: the bytes of four k of a column become the floats of four lanes, as shuffles
  // of bytes are quicker than those of lanes. So a register has two columns, and a sum four registers of each half.
  static constexpr bool kFourK = true;
  static constexpr bool kFastLookup = false;
  struct FourK {
    __m256i planes[4];  // the j-th bytes of the table's floats
    __m256 sums[8];

    explicit FourK(const float (&table)[16]) {
      for (int j = 0; j < 4; ++j) {
        alignas(16) uint8_t plane[16];
        for (int i = 0; i < 16; ++i) {
          uint32_t bits;
          std::memcpy(&bits, &table[i], 4);
          plane[i] = static_cast<uint8_t>(bits >> 8 * j);
        }
        planes[j] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(plane)));
      }
      clear();
    }
    void clear() {
      for (__m256& sum : sums) sum = _mm256_setzero_ps();
    }
    // Adds those of four k: nibbles, a byte each, and x[0..3].
    void add(Bytes nibbles, const float* x) {
      const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x));
      auto half = [&](__m256i v, __m256* to) __attribute__((always_inline)) {
        const __m256i b0 = _mm256_shuffle_epi8(planes[0], v), b1 = _mm256_shuffle_epi8(planes[1], v);
        const __m256i b2 = _mm256_shuffle_epi8(planes[2], v), b3 = _mm256_shuffle_epi8(planes[3], v);
        const __m256i low0 = _mm256_unpacklo_epi8(b0, b1), low1 = _mm256_unpackhi_epi8(b0, b1);
        const __m256i high0 = _mm256_unpacklo_epi8(b2, b3), high1 = _mm256_unpackhi_epi8(b2, b3);
        auto product = [&](__m256i w, __m256& sum) __attribute__((always_inline)) {
          sum = _mm256_fmadd_ps(_mm256_castsi256_ps(w), four, sum);
        };
        product(_mm256_unpacklo_epi16(low0, high0), to[0]);
        product(_mm256_unpackhi_epi16(low0, high0), to[1]);
        product(_mm256_unpacklo_epi16(low1, high1), to[2]);
        product(_mm256_unpackhi_epi16(low1, high1), to[3]);
      };
      half(nibbles.a, sums);
      half(nibbles.b, sums + 4);
    }
    Floats total() const {
      // Registers have columns 0 4, 1 5, 2 6, 3 7, in halves of 128 bits; so the sums come out in order.
      auto half = [](const __m256* s) {
        return _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
      };
      return {half(sums), half(sums + 4)};
    }
  };

  // v, in a register before anything that follows is computed: with all products of a step first, GCC 12 has not
  // registers enough, and keeps sums in memory.
  static __m256i settled(__m256i v) {
#if !defined(QWIX_EMULATED)
    __asm__ volatile("" : "+x"(v));
#endif
    return v;
  }

  static __m256i four(const char* act) {
    int32_t group;
    std::memcpy(&group, act, 4);
    return _mm256_set1_epi32(group);
  }

#if defined(QWIX_LAYER_AVX_VNNI)
  template <bool kFull>
  struct Dot {
    static constexpr int64_t kGroupBytes = 4;
    static constexpr bool kSaturates = false;
    static constexpr int kChains = 4;  // vpdpbusd takes 4 or 5 cycles, and there are two a row
    static constexpr int32_t kOffset = 0;
    static constexpr int64_t kFlushGroups = INT64_MAX / 8;
    using Partial = Ints;
    static Partial zero() { return iset(0); }
    static void add(Partial& p, Bytes codes, const char* act) {
      const __m256i g = four(act);
      p.a = _mm256_dpbusd_avx_epi32(p.a, codes.a, g);
      p.b = _mm256_dpbusd_avx_epi32(p.b, codes.b, g);
    }
    static Ints sums(Partial p) { return p; }
  };
};
#else
  template <bool kFull>
  struct Dot;
};

// Of codes of 8 bits, with activations of which no pair makes vpmaddubsw saturate.
template <>
struct Simd::Dot<true> {
  static constexpr int64_t kGroupBytes = 4;
  static constexpr bool kSaturates = true;
  static constexpr int kChains = 1;
  static constexpr int32_t kOffset = 0;
  static constexpr int64_t kFlushGroups = INT64_MAX / 8;
  using Partial = Ints;
  static Partial zero() { return iset(0); }
  static void add(Partial& p, Bytes codes, const char* act) {
    const __m256i g = four(act), ones = _mm256_set1_epi16(1);
    p.a = settled(_mm256_add_epi32(p.a, _mm256_madd_epi16(_mm256_maddubs_epi16(codes.a, g), ones)));
    p.b = settled(_mm256_add_epi32(p.b, _mm256_madd_epi16(_mm256_maddubs_epi16(codes.b, g), ones)));
  }
  static Ints sums(Partial p) { return p; }

  static constexpr int64_t kLimitBytes = 32;
  // Of 32 codes, a bit for each four with a pair that sums to more than 128 in magnitude; only the first `count` exist.
  static uint32_t beyond(const char* codes, int64_t count) {
    const __m256i ones = _mm256_set1_epi8(1), bound = _mm256_set1_epi16(128);
    const __m256i pairs = _mm256_maddubs_epi16(ones, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m256i halves = _mm256_cmpgt_epi16(_mm256_abs_epi16(pairs), bound);
    const __m256i signs = _mm256_or_si256(halves, _mm256_slli_epi32(halves, 16));
    const uint32_t bits = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(signs)));
    return count < 32 ? bits & ((1u << count / 4) - 1) : bits;
  }

  struct Widened;
  // 4 codes in int16, in the order 0 2 1 3; `to` may be `from`.
  static void widen(char* to, const char* from) {
    int32_t group;
    std::memcpy(&group, from, 4);
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i words = _mm_shuffle_epi8(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(group)), order);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), words);
  }
};

// Of any, widened: products in 16 bits, of the even bytes and of the odd ones.
struct Simd::Dot<true>::Widened {
  static constexpr int64_t kGroupBytes = 8;
  static constexpr bool kSaturates = false;
  static constexpr int kChains = 1;
  static constexpr int32_t kOffset = 0;
  static constexpr int64_t kFlushGroups = INT64_MAX / 8;
  using Partial = Ints;
  static Partial zero() { return iset(0); }
  static void add(Partial& p, Bytes codes, const char* act) {
    const __m256i mask = _mm256_set1_epi16(0xff), even = four(act), odd = four(act + 4);
    p.a = _mm256_add_epi32(p.a, _mm256_madd_epi16(_mm256_and_si256(codes.a, mask), even));
    p.b = _mm256_add_epi32(p.b, _mm256_madd_epi16(_mm256_and_si256(codes.b, mask), even));
    p.a = _mm256_add_epi32(p.a, _mm256_madd_epi16(_mm256_srli_epi16(codes.a, 8), odd));
    p.b = _mm256_add_epi32(p.b, _mm256_madd_epi16(_mm256_srli_epi16(codes.b, 8), odd));
  }
  static Ints sums(Partial p) { return p; }
};

// Two products of a code up to 15 and an activation are at most 2 * 15 * 128 = 3840, so that 16 bits hold 8 of
// those; of codes up to 24 they hold 5.
template <>
struct Simd::Dot<false> {
  static constexpr int64_t kGroupBytes = 4;
  static constexpr bool kSaturates = false;
  static constexpr int kChains = 1;
  static constexpr int32_t kOffset = 0;
  static constexpr int64_t kFlushGroups = 8;
  struct Partial { __m256i a, b; };
  static Partial zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static void add(Partial& p, Bytes codes, const char* act) {
    const __m256i g = four(act);
    p.a = settled(_mm256_add_epi16(p.a, _mm256_maddubs_epi16(codes.a, g)));
    p.b = settled(_mm256_add_epi16(p.b, _mm256_maddubs_epi16(codes.b, g)));
  }
  static Ints sums(Partial p) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(p.a, ones), _mm256_madd_epi16(p.b, ones)};
  }
};
#endif

}  // namespace
}  // namespace qwix
