// Rows of activations: in which groups the kernels take them, how they are prepared, and where their results go. On the
// vector layer `Simd` that the including file has chosen, see kernels.h.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "activation.h"
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
constexpr float kInt4Points[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr float kE2M1Points[16] = {0, 1, 2, 3, 4, 6, 8, 12, -0.0f, -1, -2, -3, -4, -6, -8, -12};

// The numbers of a format of 4 bits, by code: exact, times `unit`.
template <Format kFormat>
constexpr const float (&points())[16] {
  static_assert(is_nibble(kFormat));
  if constexpr (kFormat == kNF4) return kNF4Points;
  if constexpr (kFormat == kE2M1) return kE2M1Points;
  return kInt4Points;
}

// What the numbers of a format are multiplied by to give those that the kernels compute with.
constexpr float unit(Format f) { return f == kE2M1 ? 0.5f : 1.0f; }

// Whether codes have all values of 8 bits; those of the other integer formats are at most 24.
constexpr bool is_full(Format f) { return f == kInt8; }
using FullDot = Simd::Dot<true>;

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

template <int kIndex>
using K = std::integral_constant<int, kIndex>;

template <class Fn, int... kIndex>
inline __attribute__((always_inline)) void repeat_each(Fn fn, std::integer_sequence<int, kIndex...>) {
  (fn(K<kIndex>()), ...);
}

// fn(K<0>()), fn(K<1>()), ...: a loop over registers in an array. With constants for indices they stay registers; a `for`
// is unrolled by GCC 12 or not, as it finds the function large, and if not, they are memory.
template <int kCount, class Fn>
inline __attribute__((always_inline)) void repeat(Fn fn) {
  repeat_each(fn, std::make_integer_sequence<int, kCount>());
}

// ------------------------------------------------------------------------------------------- groups of rows

// A kernel multiplies a group of rows at once. Their activations lie together: those of 4 k (1 k of floats) of the
// first row, of the second, ..., then the next k. So they are read in one stream, whatever K is; rows
// at a distance of a power of two would compete for a few sets of the caches.

constexpr int64_t next_size(int64_t most) { return most > 8 ? 8 : most - 1; }

// The most rows of a group.
int64_t most_rows(const Job& job) {
  return job.integer() ? Simd::kRows : job.m <= Simd::kFewRows ? Simd::kFewRows : Simd::kPanelRows;
}

// The rows of the group that `left` rows begin with: the most, or 8, or all that are left.
int64_t group_size(int64_t most, int64_t left) { return left >= most ? most : most > 8 && left >= 8 ? 8 : left; }

// fn(first row, rows) for each group. `begin` is a multiple of the most rows, and `end` too or the last.
template <class Fn>
void each_group(const Job& job, int64_t begin, int64_t end, Fn fn) {
  const int64_t most = most_rows(job);
  for (int64_t row = begin, size; row < end; row += size) {
    size = group_size(most, end - row);
    fn(row, size);
  }
}

// fn(a constant of that size).
template <int kMost, class Fn>
void with_size(int64_t size, Fn fn) {
  if constexpr (kMost > 1) {
    if (size != kMost) return with_size<static_cast<int>(next_size(kMost))>(size, fn);
  }
  fn(std::integral_constant<int, kMost>());
}

// ------------------------------------------------------------------------------------------- activations

// The elements of a row from `k`, 16 at a time.
template <Type kType>
struct Elements {
  const char* p;

  Elements(const Job& job, int64_t row, int64_t k) : p(static_cast<const char*>(job.x) + (row * job.k + k) * kBytes) {}

  // `count` <= 16 of them from i, the rest zeros.
  Floats at(int64_t i, int64_t count) const {
    if (count == 16) return whole(p + i * kBytes);
    alignas(64) char rest[16 * kBytes] = {};
    std::copy(p + i * kBytes, p + (i + count) * kBytes, rest);
    return whole(rest);
  }

 private:
  static constexpr int64_t kBytes = kType == Type::kF32 ? 4 : 2;

  static Floats whole(const char* from) {
    if constexpr (kType == Type::kF32) return Simd::fload(reinterpret_cast<const float*>(from));
    return Simd::fload_bf16(reinterpret_cast<const uint16_t*>(from));
  }
};

// fn(Elements) of a row from `k`.
template <class Fn>
auto with_elements(const Job& job, int64_t row, int64_t k, Fn fn) {
  if (job.x_type == Type::kF32) return fn(Elements<Type::kF32>(job, row, k));
  return fn(Elements<Type::kBF16>(job, row, k));
}

int32_t total(Ints v) {
  int32_t lanes[16];
  Simd::istore(lanes, v);
  uint32_t sum = 0;
  for (int32_t lane : lanes) sum += static_cast<uint32_t>(lane);
  return static_cast<int32_t>(sum);
}

template <class Elements>
float largest_magnitude(const Elements& x, int64_t count) {
  Ints largest = Simd::iset(0);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) largest = Simd::imax(largest, Simd::magnitude_bits(x.at(i, 16)));
  if (i < count) largest = Simd::imax(largest, Simd::magnitude_bits(x.at(i, count - i)));
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

// Has put(k of the tile, Ints) write the codes of a tile of `size`, 16 at a time, `padded` of them: {scale, sum of the codes}.
template <class Elements, class Fn>
std::pair<float, int32_t> quantize_tile(const Job& job, const Elements& x, int64_t size, int64_t padded, Fn put) {
  const float scale = dynamic_scale(job, largest_magnitude(x, size));
  // As XLA does on a CPU, where a scale is shared. A row with inf or NaN has codes of 0, as it has there.
  if (!(scale <= 3.4028234663852886e38f)) {
    for (int64_t i = 0; i < padded; i += 16) put(i, Simd::iset(0));
    return {scale, 0};
  }
  const Floats inverse = Simd::fset(1.0f / scale);
  Ints sum = Simd::iset(0);
  auto quantize = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Ints codes = Simd::round(Simd::fclamp(Simd::fmul(x.at(i, count), inverse), -128, 127));
    sum = Simd::iadd(sum, codes);
    put(i, codes);
  };
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) quantize(i, 16);
  for (; i < padded; i += 16) quantize(i, std::max<int64_t>(0, size - i));
  return {scale, total(sum)};
}

// Quantizes a row, and has put(tile, k of it, Ints) write 16 codes at a time, `padded` of each tile.
template <class Fn>
void quantize_row(const Job& job, int64_t row, int64_t padded, Fn put) {
  for (int64_t t = 0; t < job.tiles; ++t) {
    const int64_t k = t * job.tile, size = job.k_of_tile(t), at = row * job.tiles + t;
    auto put_here = [&](int64_t i, Ints codes) __attribute__((always_inline)) { put(t, i, codes); };
    if (job.mode == Mode::kDynamic) {
      std::tie(job.row_scale[at], job.row_sum[at]) =
          with_elements(job, row, k, [&](const auto& x) { return quantize_tile(job, x, size, padded, put_here); });
      continue;
    }
    Ints sum = Simd::iset(0);
    for (int64_t i = 0; i < padded; i += 16) {
      int8_t given[16] = {};
      const int64_t count = std::clamp<int64_t>(size - i, 0, 16);
      std::memcpy(given, static_cast<const int8_t*>(job.x) + row * job.k + k + i, static_cast<size_t>(count));
      const Ints codes = Simd::iload_s8(given);
      sum = Simd::iadd(sum, codes);
      put_here(i, codes);
    }
    job.row_scale[at] = job.x_scale[row * job.x_tiles + (job.x_tiles == 1 ? 0 : t)];
    job.row_sum[at] = total(sum);
  }
}

// Codes of a row of a group, to out, out + stride, ...: four k each.
void prepare_codes(const Job& job, int64_t row, char* out, int64_t stride) {
  quantize_row(job, row, job.padded_tile, [&](int64_t, int64_t i, Ints codes) {
    char four[16];
    Simd::store_codes(four, codes);
    const int64_t left = std::min<int64_t>(16, job.padded_tile - i);
    for (int64_t j = 0; j < left; j += 4, out += stride) std::memcpy(out, four + j, 4);
  });
}

// Floats of a group of rows: all rows of 16 k before the next, so that what is written stays in the first cache.
inline void prepare_floats(const Job& job, int64_t first, int64_t rows, float* out) {
  for (int64_t t = 0; t < job.tiles; ++t) {
    const int64_t size = job.k_of_tile(t);
    for (int64_t i = 0; i < job.padded_tile; i += 16) {
      const int64_t count = std::clamp<int64_t>(size - i, 0, 16);
      const int64_t padded = std::min<int64_t>(16, job.padded_tile - i);
      for (int64_t r = 0; r < rows; ++r) {
        float lanes[16];
        Simd::fstore(lanes, with_elements(job, first + r, t * job.tile, [&](const auto& x) { return x.at(i, count); }));
        for (int64_t j = 0; j < padded; ++j) out[j * rows + r] = lanes[j];
      }
      out += padded * rows;
    }
  }
}

// Where sums of a row of a block wait, between parts of K or for more.
struct Waiting {
  float floats[16];
  int32_t ints[16];
};

// The codes of a group of rows on layers whose dot product saturates: what is too much of some goes to a list.
//
// vpmaddubsw sums two products in 16 bits. With codes of 8 bits it does not saturate where the two activations sum to
// at most 128 in magnitude, as 255 * 128 < 2^15: of normally distributed ones, that a scale maps to 127, all but one
// pair in a hundred do. Where they do not, what is beyond 64 goes to an `Extra`, and is multiplied apart. A
// group of rows with too many of those is widened to 16 bits, for a slower instruction.
template <class Dot>
struct Limited {
  static constexpr int64_t kChunk = 128;  // groups of 4 k

  struct Extra {
    int32_t group;  // in ascending order; of the last one the number of groups
    int32_t row;
    int8_t codes[4];
  };

  char* region;
  int64_t groups, rows;

  Limited(const Job& job, int64_t row, int64_t rows)
      : region(job.rows + row * job.row_stride), groups(job.padded_k() / 4), rows(rows) {}

  static int64_t header_bytes(int64_t k) { return (4 * (k / 4 / kChunk + 3) + 63) / 64 * 64; }
  static int64_t row_bytes(int64_t k) { return header_bytes(k) + 2 * k + 2 * sizeof(Extra); }

  char* codes() const { return region + header_bytes(4 * groups) * rows; }
  // The number of extras before each chunk; of the first, -1: the codes are widened.
  int32_t* before() const { return reinterpret_cast<int32_t*>(region); }
  bool is_widened() const { return *before() < 0; }
  Extra* extras() const { return reinterpret_cast<Extra*>(codes() + 4 * groups * rows); }

  void limit() const {
    // An extra costs as much as half a group of four rows; widened, all groups cost a third more.
    const int64_t most = groups * rows / 6;
    const int64_t bytes = 4 * groups * rows, bytes_of_chunk = 4 * kChunk * rows;
    int64_t count = 0;
    for (int64_t at = 0; at < bytes; at += Dot::kLimitBytes) {
      if (at % bytes_of_chunk == 0) before()[at / bytes_of_chunk] = static_cast<int32_t>(count);
      for (uint32_t beyond = Dot::beyond(codes() + at, bytes - at); beyond != 0; beyond &= beyond - 1) {
        if (count == most) return widen(count);
        const int64_t i = at / 4 + __builtin_ctz(beyond);  // of four codes
        Extra& extra = extras()[count++] = {static_cast<int32_t>(i / rows), static_cast<int32_t>(i % rows), {}};
        int8_t* four = reinterpret_cast<int8_t*>(codes()) + 4 * i;
        for (int j = 0; j < 4; ++j) {
          const int8_t kept = std::clamp<int8_t>(four[j], -64, 64);
          extra.codes[j] = static_cast<int8_t>(four[j] - kept);
          four[j] = kept;
        }
      }
    }
    extras()[count] = {static_cast<int32_t>(groups), 0, {}};
  }

  // Adds the products of the extras of groups [begin, end), of which `extra` is the next, to the sums that wait.
  void add_extras(const Extra*& extra, int64_t begin, int64_t end, const uint8_t* codes, Waiting* waiting) const {
    for (; extra->group < end; ++extra) {
      if (extra->group < begin) continue;
      typename Dot::Partial sum = Simd::iload(waiting[extra->row].ints);
      Dot::add(sum, Simd::load_bytes(codes + extra->group * kStepBytes), reinterpret_cast<const char*>(extra->codes));
      Simd::istore(waiting[extra->row].ints, sum);
    }
  }

  // The first extra that may be one of a group or a later one.
  const Extra* first_extra(int64_t group) const { return extras() + before()[group / kChunk]; }

 private:
  void widen(int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const Extra& extra = extras()[i];
      for (int j = 0; j < 4; ++j) codes()[4 * (extra.group * rows + extra.row) + j] += extra.codes[j];
    }
    for (int64_t i = groups * rows - 1; i >= 0; --i) Dot::widen(codes() + 8 * i, codes() + 4 * i);  // in place
    *before() = -1;
  }
};

template <class Dot>
void prepare_group(const Job& job, int64_t first, int64_t rows) {
  char* out = job.rows + first * job.row_stride;
  if constexpr (Dot::kSaturates) out = Limited<Dot>(job, first, rows).codes();
  for (int64_t r = 0; r < rows; ++r) prepare_codes(job, first + r, out + 4 * r, 4 * rows);
  if constexpr (Dot::kSaturates) Limited<Dot>(job, first, rows).limit();
}

// ------------------------------------------------------------------------------------------- the output

// Where results of a block go: the columns that exist of it, with bias and activation function.
struct Output {
  Type type;
  Activation activation;
  int64_t count, stride, at;  // columns; results of a row; the first column of all leads
  bool is_large;              // for the second-level cache
  void* y;
  const float* bias;

  Output(const Job& job, int64_t block)
      : type(job.y_type), activation(job.activation), stride(job.leads * job.n), y(job.y), bias(job.bias) {
    const int64_t column = block % job.blocks * kColumns;
    count = std::min(kColumns, job.n - column);
    at = block / job.blocks * job.n + column;
    is_large = job.m * stride > 1 << 18;
  }

  // Asks for the memory of results before they are known, where there is much of it: those of a block lie a row apart,
  // where no hardware expects them. (GCC drops calls of a function that only does this, unless they are inlined first.)
  inline __attribute__((always_inline)) void prefetch(int64_t row, int rows) const {
    if (!is_large) return;
    const int64_t size = type == Type::kF32 ? 4 : 2;
    const char* to = static_cast<char*>(y) + (row * stride + at) * size;
    for (int r = 0; r < rows; ++r, to += stride * size) {
      __builtin_prefetch(to, 1);
      __builtin_prefetch(to + count * size - 1, 1);  // in the next line, where rows are no multiple of one
    }
  }

  // (By reference: GCC 12 passes registers by value on a stack that it has not aligned for them.)
  void store(int64_t row, const Floats& sum) const {
    const int64_t out = row * stride + at;
    if (type == Type::kF32 && count == kColumns) {
      float* to = static_cast<float*>(y) + out;
      Simd::fstore(to, bias != nullptr ? Simd::fadd(sum, Simd::fload(bias + at)) : sum);
      return activate(activation, to);
    }
    float lanes[16];
    Simd::fstore(lanes, sum);
    for (int64_t i = 0; bias != nullptr && i < count; ++i) lanes[i] += bias[at + i];
    activate(activation, lanes);
    for (int64_t i = 0; i < count; ++i) {
      if (type == Type::kF32) {
        static_cast<float*>(y)[out + i] = lanes[i];
      } else {
        static_cast<uint16_t*>(y)[out + i] = to_bf16(lanes[i]);
      }
    }
  }
};

// ------------------------------------------------------------------------------------------- parts of K

// A part of the contracted axis: whole tiles, or steps of one tile.
struct Part {
  int64_t tile, tile_end;
  int64_t step, step_end;  // within a tile
  bool ends_tile;          // with its last step
  bool first, last;        // of the row

  int64_t steps() const { return (tile_end - tile) * (step_end - step); }
};

// Calls fn(Part) for parts of at most `most` steps.
template <class Fn>
void each_part(const Job& job, int64_t most, Fn fn) {
  const int64_t whole = job.tiles - (job.last_steps != job.steps);  // tiles
  const int64_t tiles_of_part = job.steps < most ? most / job.steps : 1;
  for (int64_t t = 0, end; t < job.tiles; t = end) {
    end = t < whole ? std::min(whole, t + tiles_of_part) : t + 1;
    const int64_t steps = job.steps_of_tile(t);
    for (int64_t s = 0; s < steps; s += most) {
      const int64_t step_end = std::min(steps, s + most);
      const bool ends_tile = step_end == steps;
      fn(Part{t, end, s, step_end, ends_tile, t == 0 && s == 0, ends_tile && end == job.tiles});
    }
  }
}

// What one call of `multiply` does: blocks, rows.
struct Range {
  int64_t block, block_end;
  int64_t begin, end;
};

constexpr int64_t kWaitingBytes = kBlocksOfPass * kRowsOfItem * static_cast<int64_t>(sizeof(Waiting));

// Calls fn(part, block, ahead, sums) for the parts of a range: a part of all rows stays in the second-level cache, while
// that of some blocks, one after the other, goes through the first. `ahead` bytes after a part of a block lies the
// one that comes next; `sums` are those of the block's rows.
template <class Fn>
void each_pass(const Job& job, const Range& range, int64_t most_steps, Waiting* waiting, Fn fn) {
  const int64_t rows = range.end - range.begin, stride = job.block_bytes();
  const int64_t blocks = rows > kRowsOfItem ? kBlocksOfPass / 2 : kBlocksOfPass;
  for (int64_t start = range.block; start < range.block_end; start += blocks) {
    const int64_t end = std::min(range.block_end, start + blocks);
    each_part(job, most_steps, [&](const Part& part) {
      for (int64_t block = start; block < end; ++block) {
        const int64_t ahead = block + 1 < end ? stride : part.steps() * kStepBytes - (end - 1 - start) * stride;
        fn(part, block, ahead, waiting + (block - start) * rows);
      }
    });
  }
}

constexpr int64_t kStreamAhead = 256;  // of codes that one group of rows reads, once; the CPU looks further by itself

// Fetches what lies `ahead` bytes after p into the cache; there need be nothing.
inline __attribute__((always_inline)) void prefetch(const void* p, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(ahead)));
}

// out[r] += sum_k x[k kStep + r kStride] panel[k].
template <int kRows, int64_t kStride, int64_t kStep>
inline __attribute__((always_inline)) void add_products(const float* x, const float* panel, int64_t k_count,
                                                        Floats (&out)[kRows]) {
  for (int64_t k = 0; k < k_count; ++k, x += kStep, panel += kColumns) {
    const Floats w = Simd::fload(panel);
    for (int r = 0; r < kRows; ++r) out[r] = Simd::fma(w, Simd::fset(x[r * kStride]), out[r]);
  }
}

}  // namespace
}  // namespace qwix
