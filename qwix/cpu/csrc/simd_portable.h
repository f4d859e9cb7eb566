// The vector layer in portable C++, which also defines what each name means in the others.
//
// `Floats` and `Ints` hold one number for each of the 16 columns of a block, `Bytes` four bytes for each column.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "job.h"

namespace qwix {
namespace {

struct Simd {
  static constexpr const char* kName = "portable";
  // Rows of the output in one pass: over codes in integers; over codes in floats; over a panel of floats.
  static constexpr int kRows = 4;
  static constexpr int kFewRows = 4;
  static constexpr int kPanelRows = 4;

  struct Floats { float v[16]; };
  struct Ints { int32_t v[16]; };
  struct Bytes { uint8_t v[64]; };

  template <class Out, class Fn>
  static Out each(Fn fn) {
    Out out;
    for (int i = 0; i < 16; ++i) out.v[i] = fn(i);
    return out;
  }
  static float as_float(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }

  static Floats fset(float v) {
    return each<Floats>([&](int) { return v; });
  }
  static Floats fload(const float* p) {
    return each<Floats>([&](int i) { return p[i]; });
  }
  static void fstore(float* p, Floats v) { std::memcpy(p, v.v, sizeof v.v); }
  static Floats fload_bf16(const uint16_t* p) {
    return each<Floats>([&](int i) { return as_float(static_cast<uint32_t>(p[i]) << 16); });
  }
  static Floats fload_f16(const uint16_t* p) {
    return each<Floats>([&](int i) {
      const uint32_t sign = static_cast<uint32_t>(p[i] & 0x8000) << 16, rest = p[i] & 0x7fff;
      const float magnitude = rest >= 0x7c00  ? as_float(0x7f800000u | rest << 13)
                              : rest < 0x0400 ? static_cast<float>(rest) * 0x1p-24f
                                              : as_float((rest << 13) + (112u << 23));
      return sign ? -magnitude : magnitude;
    });
  }
  static Floats fma(Floats x, Floats y, Floats z) {
    return each<Floats>([&](int i) { return x.v[i] * y.v[i] + z.v[i]; });
  }
  static Floats fmul(Floats x, Floats y) {
    return each<Floats>([&](int i) { return x.v[i] * y.v[i]; });
  }
  static Floats fadd(Floats x, Floats y) {
    return each<Floats>([&](int i) { return x.v[i] + y.v[i]; });
  }
  static Floats fsub(Floats x, Floats y) {
    return each<Floats>([&](int i) { return x.v[i] - y.v[i]; });
  }
  static float fsum(Floats x) {
    float sum = 0;
    for (float lane : x.v) sum += lane;
    return sum;
  }
  // Where x is NaN, y.
  static Floats fmax(Floats x, Floats y) {
    return each<Floats>([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
  }
  static Floats fclamp(Floats x, float low, float high) {
    return each<Floats>([&](int i) { return x.v[i] < low ? low : x.v[i] > high ? high : x.v[i]; });
  }

  static Ints iset(int32_t v) {
    return each<Ints>([&](int) { return v; });
  }
  static Ints iload(const int32_t* p) {
    return each<Ints>([&](int i) { return p[i]; });
  }
  static void istore(int32_t* p, Ints v) { std::memcpy(p, v.v, sizeof v.v); }
  static Ints iload_u8(const uint8_t* p) {
    return each<Ints>([&](int i) { return int32_t{p[i]}; });
  }
  static Ints iload_s8(const int8_t* p) {
    return each<Ints>([&](int i) { return int32_t{p[i]}; });
  }
  // Of 32 bits, wrapping around.
  static Ints iadd(Ints x, Ints y) {
    return each<Ints>([&](int i) {
      return static_cast<int32_t>(static_cast<uint32_t>(x.v[i]) + static_cast<uint32_t>(y.v[i]));
    });
  }
  static Ints isub(Ints x, Ints y) {
    return each<Ints>([&](int i) {
      return static_cast<int32_t>(static_cast<uint32_t>(x.v[i]) - static_cast<uint32_t>(y.v[i]));
    });
  }
  static Ints imul(Ints x, Ints y) {
    return each<Ints>([&](int i) {
      return static_cast<int32_t>(static_cast<uint32_t>(x.v[i]) * static_cast<uint32_t>(y.v[i]));
    });
  }
  static Ints imax(Ints x, Ints y) {
    return each<Ints>([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
  }
  // The bits of |x|, which are ordered as |x| is, with NaN above inf.
  static Ints magnitude_bits(Floats x) {
    return each<Ints>([&](int i) {
      uint32_t bits;
      std::memcpy(&bits, &x.v[i], 4);
      return static_cast<int32_t>(bits & 0x7fffffffu);
    });
  }
  static Floats to_float(Ints v) {
    return each<Floats>([&](int i) { return static_cast<float>(v.v[i]); });
  }
  // To the nearest, ties to even; of numbers within int32.
  static Ints round(Floats v) {
    return each<Ints>([&](int i) { return static_cast<int32_t>(std::nearbyint(v.v[i])); });
  }

  // 16 codes of an activation, in int8.
  static void store_codes(char* p, Ints v) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<char>(static_cast<int8_t>(v.v[i]));
  }

  static Bytes load_bytes(const uint8_t* p) {
    Bytes out;
    std::memcpy(out.v, p, 64);
    return out;
  }
  static void store_bytes(uint8_t* p, Bytes v) { std::memcpy(p, v.v, 64); }
  template <class Fn>
  static Bytes each_byte(Bytes v, Fn fn) {
    for (int i = 0; i < 64; ++i) v.v[i] = static_cast<uint8_t>(fn(v.v[i]));
    return v;
  }
  static Bytes low_nibbles(Bytes v) {
    return each_byte(v, [](uint8_t b) { return b & 15; });
  }
  static Bytes high_nibbles(Bytes v) {
    return each_byte(v, [](uint8_t b) { return b >> 4; });
  }
  static Bytes lookup(const int8_t (&table)[16], Bytes nibbles) {
    return each_byte(nibbles, [&](uint8_t b) { return table[b & 15]; });
  }
  static Bytes flip(Bytes v, uint8_t bits) {
    return each_byte(v, [&](uint8_t b) { return b ^ bits; });
  }
  static uint32_t column(const Bytes& v, int i) {
    return v.v[4 * i] | v.v[4 * i + 1] << 8 | v.v[4 * i + 2] << 16 | static_cast<uint32_t>(v.v[4 * i + 3]) << 24;
  }
  // Bits [shift, shift + width) of each column's 32, as a signed number.
  template <int kShift, int kWidth>
  static Ints field(Bytes v) {
    return each<Ints>([&](int i) {
      return static_cast<int32_t>(column(v, i) << (32 - kShift - kWidth)) >> (32 - kWidth);
    });
  }
  // table[bits [shift, shift + 4) of each column's 32].
  template <int kShift>
  static Floats field_lookup(const float (&table)[16], Bytes v) {
    return each<Floats>([&](int i) { return table[column(v, i) >> kShift & 15]; });
  }
  // fp8 of the byte in the low 8 bits (sign-extended) as float. Relies on denormals being honoured.
  template <Format kFormat>
  static Floats fp8(Ints v) {
    constexpr bool kE4 = kFormat == kE4M3;
    return each<Floats>([&](int i) {
      const uint32_t magnitude = v.v[i] & 0x7f, sign = v.v[i] & 0x80000000u;
      const uint32_t special = kE4 ? (magnitude == 0x7f ? ~0u : 0u) : magnitude > 0x7b ? 0x7f800000u : 0u;
      const uint32_t bits = magnitude << (kE4 ? 20 : 21) | special | sign;
      return as_float(bits) * (kE4 ? 0x1p120f : 0x1p112f);
    });
  }

  // Whether the layer has a quicker way for finite numbers: `fp8_finite`, where `is_finite` says so of all bytes.
  static constexpr bool kFiniteFp8 = false;
  // Whether the layer has `FourK`: the products of nf4 with one row, four k in the lanes of a column.
  static constexpr bool kFourK = false;
  // Whether `field_lookup` is quicker than to make floats of integers.
  static constexpr bool kFastLookup = false;

  // Sums of products of codes and activations, for each column. kFull: codes of 8 bits, else up to 24.
  template <bool kFull>
  struct Dot {
    static constexpr int64_t kGroupBytes = 4;   // of the activations of 4 k
    static constexpr bool kSaturates = false;   // for some full codes and activations, see `Limited` in rows.h
    static constexpr int kChains = 1;           // of sums that have to go on at once, for full speed
    static constexpr int32_t kOffset = 0;       // what is taken off a code before it is multiplied
    // How many calls of `add` a Partial holds, for codes up to 15; half as many for those up to 24.
    static constexpr int64_t kFlushGroups = INT64_MAX / 8;
    using Partial = Ints;
    static Partial zero() { return iset(0); }
    // One group of 4 k: `codes` of each column, `act` of one row.
    static void add(Partial& p, Bytes codes, const char* act) {
      for (int i = 0; i < 16; ++i) {
        int32_t sum = 0;
        for (int j = 0; j < 4; ++j) sum += codes.v[4 * i + j] * static_cast<int8_t>(act[j]);
        p.v[i] = static_cast<int32_t>(static_cast<uint32_t>(p.v[i]) + static_cast<uint32_t>(sum));
      }
    }
    static Ints sums(Partial p) { return p; }
  };
};

}  // namespace
}  // namespace qwix
