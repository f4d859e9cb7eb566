// The kernels, written once on the vector layer `Simd` that the including file has chosen (simd_*.h).
//
// Everything is in an anonymous namespace: each file is compiled with flags of its own, and a function that the
// linker merged with that of another file would run instructions that the CPU may not have.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "attention.h"
#include "job.h"

namespace qwix {
namespace {

using Floats = Simd::Floats;
using Ints = Simd::Ints;
using Bytes = Simd::Bytes;

// Twice the numbers of float4_e2m1fn, all integers, by code; and with `code_of_zero` added.
constexpr int8_t kE2M1Twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr int8_t kE2M1Codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// The code points of nf4, QLoRA (arXiv 2305.14314), appendix E.
constexpr float kNF4Points[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
    0.7229568362236023f, 1.0f};

// What the numbers of a format are multiplied by to give those that the kernels compute with.
constexpr float unit(Format f) { return f == kE2M1 ? 0.5f : 1.0f; }

constexpr bool is_wide(Format f) { return f == kInt8; }

float to_f32(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

uint16_t to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

Floats load_scale(const Job& job, int64_t block, int64_t tile) {
  const int64_t at = (block * job.tiles + tile) * kColumns;
  switch (job.scale_type) {
    case Type::kBF16: return Simd::fload_bf16(static_cast<const uint16_t*>(job.scale) + at);
    case Type::kF16: return Simd::fload_f16(static_cast<const uint16_t*>(job.scale) + at);
    default: return Simd::fload(static_cast<const float*>(job.scale) + at);
  }
}

// The unsigned zero points of a tile; `job.zeros` is not null.
Ints load_zeros(const Job& job, int64_t block, int64_t tile) {
  return Simd::iload_u8(job.zeros + (block * job.tiles + tile) * kColumns);
}

// ------------------------------------------------------------------------------------------- activations

// `count` <= 16 elements of a row from `k`, the rest zeros.
Floats load_x(const Job& job, int64_t row, int64_t k, int64_t count) {
  const int64_t at = row * job.k + k;
  if (job.x_type == Type::kF32) {
    const float* p = static_cast<const float*>(job.x) + at;
    if (count == 16) return Simd::fload(p);
    float rest[16] = {};
    std::copy(p, p + count, rest);
    return Simd::fload(rest);
  }
  const uint16_t* p = static_cast<const uint16_t*>(job.x) + at;
  if (count == 16) return Simd::fload_bf16(p);
  uint16_t rest[16] = {};
  std::copy(p, p + count, rest);
  return Simd::fload_bf16(rest);
}

int32_t total(Ints v) {
  int32_t lanes[16];
  Simd::istore(lanes, v);
  uint32_t sum = 0;
  for (int32_t lane : lanes) sum += static_cast<uint32_t>(lane);
  return static_cast<int32_t>(sum);
}

float largest_magnitude(const Job& job, int64_t row, int64_t k) {
  Ints largest = Simd::iset(0);
  for (int64_t i = 0; i < job.tile; i += 16) {
    largest = Simd::imax(largest, Simd::magnitude_bits(load_x(job, row, k + i, std::min<int64_t>(16, job.tile - i))));
  }
  int32_t lanes[16];
  Simd::istore(lanes, largest);
  const int32_t bits = *std::max_element(lanes, lanes + 16);
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// absmax / 127.5 in the dtype of x, as `compute_scale_zero_point` has it.
float dynamic_scale(const Job& job, float absmax) {
  const bool is_bf16 = job.x_type == Type::kBF16;
  if (job.factor != 1.0f) {
    absmax *= job.factor;
    if (is_bf16) absmax = to_f32(to_bf16(absmax));
  }
  float scale = absmax / 127.5f;
  if (scale < 0x1p-63f) return 1.0f;  // sqrt of the smallest normal number
  return is_bf16 ? to_f32(to_bf16(scale)) : scale;
}

template <bool kWide>
void prepare_codes(const Job& job, int64_t row) {
  constexpr int64_t kSize = kWide ? 2 : 1;
  char* out = job.rows + row * job.row_stride;
  for (int64_t t = 0; t < job.tiles; ++t) {
    const int64_t k = t * job.tile;
    float scale, inverse = 0;
    if (job.mode == Mode::kDynamic) {
      scale = dynamic_scale(job, largest_magnitude(job, row, k));
      // As XLA does on a CPU, where a scale is shared. A row with inf or NaN has codes of 0, as it has there.
      if (scale <= 3.4028234663852886e38f) inverse = 1.0f / scale;
    } else {
      scale = job.x_scale[row * job.x_tiles + (job.x_tiles == 1 ? 0 : t)];
    }
    Ints sum = Simd::iset(0);
    for (int64_t i = 0; i < job.padded_tile; i += 16) {
      const int64_t count = std::clamp<int64_t>(job.tile - i, 0, 16);
      Ints codes;
      if (job.mode == Mode::kDynamic && inverse == 0) {
        codes = Simd::iset(0);
      } else if (job.mode == Mode::kDynamic) {
        const Floats x = Simd::fmul(load_x(job, row, k + i, count), Simd::fset(inverse));
        codes = Simd::round(Simd::fclamp(x, -128, 127));
      } else {
        int8_t given[16] = {};
        std::memcpy(given, static_cast<const int8_t*>(job.x) + row * job.k + k + i, count);
        codes = Simd::iload_s8(given);
      }
      sum = Simd::iadd(sum, codes);
      const int64_t left = job.padded_tile - i;
      if (left >= 16) {
        Simd::store_codes<kWide>(out, codes);
      } else {  // tiles are multiples of 8
        char both[16 * kSize];
        Simd::store_codes<kWide>(both, codes);
        std::memcpy(out, both, left * kSize);
      }
      out += std::min<int64_t>(16, left) * kSize;
    }
    job.row_scale[row * job.tiles + t] = scale;
    job.row_sum[row * job.tiles + t] = total(sum);
  }
}

void prepare_floats(const Job& job, int64_t row) {
  float* out = reinterpret_cast<float*>(job.rows + row * job.row_stride);
  for (int64_t t = 0; t < job.tiles; ++t) {
    Floats sum = Simd::fset(0);
    for (int64_t i = 0; i < job.padded_tile; i += 16) {
      const Floats x = load_x(job, row, t * job.tile + i, std::clamp<int64_t>(job.tile - i, 0, 16));
      sum = Simd::fadd(sum, x);
      float both[16];
      Simd::fstore(both, x);
      const int64_t left = std::min<int64_t>(16, job.padded_tile - i);
      std::memcpy(out, both, left * sizeof(float));
      out += left;
    }
    float lanes[16], all = 0;
    Simd::fstore(lanes, sum);
    for (float lane : lanes) all += lane;
    std::memcpy(&job.row_sum[row * job.tiles + t], &all, 4);
  }
}

bool wide_rows(const Job& job) {
  return is_wide(job.format) ? Simd::Dot<true>::kWideActs : Simd::Dot<false>::kWideActs;
}

int64_t row_bytes(const Job& job) {
  return job.padded_k() * (!job.integer() ? 4 : wide_rows(job) ? 2 : 1);
}

void prepare(const Job& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (!job.integer()) {
      prepare_floats(job, row);
    } else if (wide_rows(job)) {
      prepare_codes<true>(job, row);
    } else {
      prepare_codes<false>(job, row);
    }
  }
}

// ------------------------------------------------------------------------------------------- the output

// Writes the columns that exist of a row of a block, with bias.
void store_output(const Job& job, int64_t row, int64_t block, Floats v) {
  const int64_t lead = block / job.blocks, column = block % job.blocks * kColumns;
  const int64_t count = std::min(kColumns, job.n - column);
  const int64_t at = lead * job.n + column, out = row * job.leads * job.n + at;
  float lanes[16];
  if (job.y_type == Type::kF32 && count == kColumns) {
    if (job.bias != nullptr) v = Simd::fadd(v, Simd::fload(job.bias + at));
    Simd::fstore(static_cast<float*>(job.y) + out, v);
    return;
  }
  Simd::fstore(lanes, v);
  for (int64_t i = 0; i < count; ++i) {
    const float y = job.bias == nullptr ? lanes[i] : lanes[i] + job.bias[at + i];
    if (job.y_type == Type::kF32) {
      static_cast<float*>(job.y)[out + i] = y;
    } else {
      static_cast<uint16_t*>(job.y)[out + i] = to_bf16(y);
    }
  }
}

// ------------------------------------------------------------------------------------------- integers

// A part of the contracted axis: whole tiles, or steps of one tile.
struct Part {
  int64_t tile, tile_end;
  int64_t step, step_end;  // within a tile
  bool first, last;        // of the row
};

// Calls fn(Part) for parts of at most `most` steps, that are multiples of `multiple` where they can be.
template <class Fn>
void each_part(const Job& job, int64_t most, Fn fn) {
  const int64_t steps = job.steps_of_tile();
  if (steps <= most) {
    const int64_t tiles = std::max<int64_t>(1, most / steps);
    for (int64_t t = 0; t < job.tiles; t += tiles) {
      const int64_t end = std::min(job.tiles, t + tiles);
      fn(Part{t, end, 0, steps, t == 0, end == job.tiles});
    }
    return;
  }
  for (int64_t t = 0; t < job.tiles; ++t) {
    for (int64_t s = 0; s < steps; s += most) {
      const int64_t end = std::min(steps, s + most);
      fn(Part{t, t + 1, s, end, t == 0 && s == 0, t + 1 == job.tiles && end == steps});
    }
  }
}

// Where sums of a row of a block wait between parts.
struct Waiting {
  float floats[16];
  int32_t ints[16];
};

template <Format kFormat, int kRows>
void integer_rows(const Job& job, int64_t block, int64_t row, const Part& part, Waiting* waiting) {
  using Dot = Simd::Dot<is_wide(kFormat)>;
  constexpr int64_t kGroup = Dot::kWideActs ? 8 : 4;  // bytes of 4 activations
  constexpr int64_t kGroups = step_k(kFormat) / 4;
  constexpr int64_t kFlush = Dot::kFlushGroups / kGroups / (kFormat == kE2M1 ? 2 : 1);
  const int64_t steps = job.steps_of_tile();
  Floats out[kRows];
  for (int r = 0; r < kRows; ++r) out[r] = part.first ? Simd::fset(0) : Simd::fload(waiting[r].floats);
  for (int64_t t = part.tile; t < part.tile_end; ++t) {
    const int64_t at = t * steps + part.step;
    const uint8_t* codes = job.codes + block * job.block_bytes() + at * kStepBytes;
    const char* act = job.rows + row * job.row_stride + at * kGroups * kGroup;
    Ints sums[kRows];
    for (int r = 0; r < kRows; ++r) sums[r] = part.step == 0 ? Simd::iset(0) : Simd::iload(waiting[r].ints);
    for (int64_t s = part.step; s < part.step_end;) {
      const int64_t end = std::min(part.step_end, s + kFlush);
      typename Dot::Partial partial[kRows];
      for (int r = 0; r < kRows; ++r) partial[r] = Dot::zero();
      for (; s < end; ++s, codes += kStepBytes, act += kGroups * kGroup) {
        const Bytes loaded = Simd::load_bytes(codes);
        if constexpr (is_nibble(kFormat)) {
          Bytes low = Simd::low_nibbles(loaded), high = Simd::high_nibbles(loaded);
          if constexpr (kFormat == kE2M1) {
            low = Simd::lookup(kE2M1Codes, low);
            high = Simd::lookup(kE2M1Codes, high);
          }
          for (int r = 0; r < kRows; ++r) Dot::add(partial[r], low, act + r * job.row_stride);
          for (int r = 0; r < kRows; ++r) Dot::add(partial[r], high, act + r * job.row_stride + kGroup);
        } else {
          for (int r = 0; r < kRows; ++r) Dot::add(partial[r], loaded, act + r * job.row_stride);
        }
      }
      for (int r = 0; r < kRows; ++r) sums[r] = Simd::iadd(sums[r], Dot::sums(partial[r]));
    }
    if (part.step_end < steps) {
      for (int r = 0; r < kRows; ++r) Simd::istore(waiting[r].ints, sums[r]);
      continue;
    }
    Floats scale = load_scale(job, block, t);
    if constexpr (kFormat == kE2M1) scale = Simd::fmul(scale, Simd::fset(unit(kFormat)));
    const bool asymmetric = kFormat != kE2M1 && job.zeros != nullptr;
    const Ints zeros = asymmetric ? load_zeros(job, block, t) : Simd::iset(0);
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = (row + r) * job.tiles + t;
      const uint32_t row_sum = static_cast<uint32_t>(job.row_sum[i]);
      const Ints correction = asymmetric
                                  ? Simd::imul(zeros, Simd::iset(job.row_sum[i]))
                                  : Simd::iset(static_cast<int32_t>(row_sum * uint32_t{code_of_zero(kFormat)}));
      const Floats exact = Simd::to_float(Simd::isub(sums[r], correction));
      const Floats scaled = Simd::fmul(exact, Simd::fset(job.row_scale[i]));
      out[r] = Simd::fma(scaled, scale, out[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    if (part.last) {
      store_output(job, row + r, block, out[r]);
    } else {
      Simd::fstore(waiting[r].floats, out[r]);
    }
  }
}

// ------------------------------------------------------------------------------------------- floats

template <int kIndex>
using K = std::integral_constant<int, kIndex>;

// Calls fn(K<j>(), Floats) for each of the k of a step, k = 0, 1, ...; numbers are exact, times `unit`.
template <Format kFormat, class Fn>
inline __attribute__((always_inline)) void each_k(const uint8_t* codes, Fn fn) {
  const Bytes loaded = Simd::load_bytes(codes);
  auto nibbles = [&](auto... j) __attribute__((always_inline)) {
    // Of byte i of a column, the low half is k = i and the high one k = 4 + i.
    if constexpr (kFormat == kInt4) {
      const Bytes numbers = Simd::flip(loaded, 0x88);
      (fn(j, Simd::to_float(Simd::template field<j % 4 * 8 + j / 4 * 4, 4>(numbers))), ...);
    } else {
      (fn(j, Simd::template field_lookup<j % 4 * 8 + j / 4 * 4>(kNF4Points, loaded)), ...);
    }
  };
  auto bytes = [&](const Bytes& v, auto... j) __attribute__((always_inline)) {
    if constexpr (kFormat == kE4M3 || kFormat == kE5M2) {
      (fn(j, Simd::template fp8<kFormat>(Simd::template field<j % 4 * 8, 8>(v))), ...);
    } else {
      (fn(j, Simd::to_float(Simd::template field<j % 4 * 8, 8>(v))), ...);
    }
  };
  if constexpr (kFormat == kInt4 || kFormat == kNF4) {
    nibbles(K<0>(), K<1>(), K<2>(), K<3>(), K<4>(), K<5>(), K<6>(), K<7>());
  } else if constexpr (kFormat == kE2M1) {
    bytes(Simd::lookup(kE2M1Twice, Simd::low_nibbles(loaded)), K<0>(), K<1>(), K<2>(), K<3>());
    bytes(Simd::lookup(kE2M1Twice, Simd::high_nibbles(loaded)), K<4>(), K<5>(), K<6>(), K<7>());
  } else {
    bytes(kFormat == kInt8 ? Simd::flip(loaded, 0x80) : loaded, K<0>(), K<1>(), K<2>(), K<3>());
  }
}

// zero point - code of zero, of a tile; what is left to subtract from the numbers that `each_k` gives.
Floats signed_zeros(const Job& job, int64_t block, int64_t tile) {
  return Simd::to_float(Simd::isub(load_zeros(job, block, tile), Simd::iset(code_of_zero(job.format))));
}

const float* float_row(const Job& job, int64_t row) {
  return reinterpret_cast<const float*>(job.rows + row * job.row_stride);
}

// A few rows, straight from the codes.
template <Format kFormat, int kRows>
void float_rows(const Job& job, int64_t block, int64_t row) {
  constexpr int kSets = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;  // sums in parallel, to hide the latency of fma
  const int64_t steps = job.steps_of_tile();
  const uint8_t* codes = job.codes + block * job.block_bytes();
  const float* x[kRows];
  Floats out[kRows];
  for (int r = 0; r < kRows; ++r) {
    x[r] = float_row(job, row + r);
    out[r] = Simd::fset(0);
  }
  for (int64_t t = 0; t < job.tiles; ++t) {
    Floats sums[kRows][kSets];
    for (auto& sets : sums) {
      for (Floats& set : sets) set = Simd::fset(0);
    }
    for (int64_t s = 0; s < steps; ++s, codes += kStepBytes) {
      each_k<kFormat>(codes, [&](auto j, Floats w) __attribute__((always_inline)) {
        for (int r = 0; r < kRows; ++r) {
          sums[r][j % kSets] = Simd::fma(w, Simd::fset(x[r][j]), sums[r][j % kSets]);
        }
      });
      for (int r = 0; r < kRows; ++r) x[r] += step_k(kFormat);
    }
    Floats scale = load_scale(job, block, t);
    if constexpr (kFormat == kE2M1) scale = Simd::fmul(scale, Simd::fset(unit(kFormat)));
    const bool asymmetric = is_integer(kFormat) && job.zeros != nullptr;
    const Floats zeros = asymmetric ? signed_zeros(job, block, t) : Simd::fset(0);
    for (int r = 0; r < kRows; ++r) {
      Floats sum = sums[r][0];
      for (int i = 1; i < kSets; ++i) sum = Simd::fadd(sum, sums[r][i]);
      if (asymmetric) {
        float row_sum;
        std::memcpy(&row_sum, &job.row_sum[(row + r) * job.tiles + t], 4);
        sum = Simd::fsub(sum, Simd::fmul(zeros, Simd::fset(row_sum)));
      }
      out[r] = Simd::fma(sum, scale, out[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) store_output(job, row + r, block, out[r]);
}

// Many rows: a part of the block is dequantized once, to (k, 16) floats.
template <Format kFormat>
void dequantize_part(const Job& job, int64_t block, const Part& part, float* panel) {
  const int64_t steps = job.steps_of_tile();
  for (int64_t t = part.tile; t < part.tile_end; ++t) {
    Floats scale = load_scale(job, block, t);
    if constexpr (kFormat == kE2M1) scale = Simd::fmul(scale, Simd::fset(unit(kFormat)));
    const bool asymmetric = is_integer(kFormat) && job.zeros != nullptr;
    const Floats zeros = asymmetric ? signed_zeros(job, block, t) : Simd::fset(0);
    const uint8_t* codes = job.codes + block * job.block_bytes() + (t * steps + part.step) * kStepBytes;
    for (int64_t s = part.step; s < part.step_end; ++s, codes += kStepBytes) {
      each_k<kFormat>(codes, [&](auto j, Floats w) __attribute__((always_inline)) {
        Simd::fstore(panel + j * kColumns, Simd::fmul(Simd::fsub(w, zeros), scale));
      });
      panel += step_k(kFormat) * kColumns;
    }
  }
}

template <int kRows>
void panel_rows(const Job& job, int64_t block, int64_t row, const Part& part, const float* panel, int64_t k_begin,
                int64_t k_count, Waiting* waiting) {
  Floats out[kRows];
  for (int r = 0; r < kRows; ++r) out[r] = part.first ? Simd::fset(0) : Simd::fload(waiting[r].floats);
  const float* x = float_row(job, row) + k_begin;
  const int64_t stride = job.row_stride / static_cast<int64_t>(sizeof(float));
  for (int64_t k = 0; k < k_count; ++k, panel += kColumns) {
    const Floats w = Simd::fload(panel);
    for (int r = 0; r < kRows; ++r) out[r] = Simd::fma(w, Simd::fset(x[r * stride + k]), out[r]);
  }
  for (int r = 0; r < kRows; ++r) {
    if (part.last) {
      store_output(job, row + r, block, out[r]);
    } else {
      Simd::fstore(waiting[r].floats, out[r]);
    }
  }
}

// ------------------------------------------------------------------------------------------- all of it

// fn(constant count, first row), with as few calls as counts up to kMost allow.
template <int kMost, class Fn>
void by_rows(int64_t begin, int64_t end, Fn fn) {
  int64_t row = begin;
  for (; end - row >= kMost; row += kMost) fn(std::integral_constant<int, kMost>(), row);
  if constexpr (kMost > 1) {
    if (row < end) by_rows<kMost - 1>(row, end, fn);
  }
}

template <Format kFormat>
void multiply_format(const Job& job, int64_t block, int64_t block_end, int64_t begin, int64_t end, char* workspace) {
  Waiting* waiting = reinterpret_cast<Waiting*>(workspace);
  const int64_t rows = end - begin;
  for (; block < block_end; ++block) {
    if (job.integer()) {
      if constexpr (is_integer(kFormat)) {
        // A few rows need no parts; for many, 16 KiB of codes stay in the first-level cache.
        const int64_t most = rows <= Simd::kRows ? INT64_MAX : 256;
        each_part(job, most, [&](const Part& part) {
          by_rows<Simd::kRows>(begin, end, [&](auto count, int64_t row) {
            integer_rows<kFormat, decltype(count)::value>(job, block, row, part, waiting + (row - begin));
          });
        });
      }
    } else if (rows <= Simd::kRows) {
      by_rows<Simd::kRows>(begin, end, [&](auto count, int64_t row) {
        float_rows<kFormat, decltype(count)::value>(job, block, row);
      });
    } else {
      float* panel = reinterpret_cast<float*>(workspace + sizeof(Waiting) * kRowsOfItem);
      each_part(job, kPanelK / step_k(kFormat), [&](const Part& part) {
        dequantize_part<kFormat>(job, block, part, panel);
        const int64_t k_begin = part.tile * job.padded_tile + part.step * step_k(kFormat);
        const int64_t k_count = (part.tile_end - part.tile) * (part.step_end - part.step) * step_k(kFormat);
        by_rows<Simd::kPanelRows>(begin, end, [&](auto count, int64_t row) {
          panel_rows<decltype(count)::value>(job, block, row, part, panel, k_begin, k_count, waiting + (row - begin));
        });
      });
    }
  }
}

void multiply(const Job& job, int64_t block, int64_t block_end, int64_t begin, int64_t end, char* workspace) {
  switch (job.format) {
    case kInt8: return multiply_format<kInt8>(job, block, block_end, begin, end, workspace);
    case kInt4: return multiply_format<kInt4>(job, block, block_end, begin, end, workspace);
    case kE2M1: return multiply_format<kE2M1>(job, block, block_end, begin, end, workspace);
    case kNF4: return multiply_format<kNF4>(job, block, block_end, begin, end, workspace);
    case kE4M3: return multiply_format<kE4M3>(job, block, block_end, begin, end, workspace);
    case kE5M2: return multiply_format<kE5M2>(job, block, block_end, begin, end, workspace);
  }
}

int64_t workspace_bytes(const Job& job) {
  const int64_t waiting = static_cast<int64_t>(sizeof(Waiting)) * kRowsOfItem;
  // `each_part` gives at least one step, and a tile of up to kPanelK.
  return job.integer() ? waiting : waiting + kPanelK * kColumns * static_cast<int64_t>(sizeof(float));
}

constexpr Kernels kKernels = {Simd::kName, row_bytes, workspace_bytes, prepare, multiply, attend, merge};

}  // namespace
}  // namespace qwix
