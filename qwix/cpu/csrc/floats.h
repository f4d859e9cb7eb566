// Products of dequantized numbers with float activations.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace qwix {
namespace {

// Calls fn(K<j>(), Floats) for four k of fp8. A template of the layer, which may have no `fp8_finite`.
template <class Layer, Format kFormat, class Fn, class... Index>
inline __attribute__((always_inline)) void each_fp8(const Bytes& v, Fn fn, Index... j) {
  if constexpr (Layer::kFiniteFp8) {
    if (Layer::template is_finite<kFormat>(v)) {
      (fn(j, Layer::template fp8_finite<kFormat, j % 4 * 8>(v)), ...);
      return;
    }
  }
  (fn(j, Layer::template fp8<kFormat>(Layer::template field<j % 4 * 8, 8>(v))), ...);
}

// Calls fn(K<j>(), Floats) for each of the k of a step, k = 0, 1, ...; numbers are exact, times `unit`.
template <Format kFormat, class Fn>
inline __attribute__((always_inline)) void each_k(const uint8_t* codes, Fn fn) {
  const Bytes loaded = Simd::load_bytes(codes);
  auto nibbles = [&](auto... j) __attribute__((always_inline)) {
    // Of byte i of a column, the low half is k = i and the high one k = 4 + i.
    if constexpr (kFormat == kInt4 && !Simd::kFastLookup) {
      const Bytes numbers = Simd::flip(loaded, 0x88);
      (fn(j, Simd::to_float(Simd::template field<j % 4 * 8 + j / 4 * 4, 4>(numbers))), ...);
    } else {
      (fn(j, Simd::template field_lookup<j % 4 * 8 + j / 4 * 4>(points<kFormat>(), loaded)), ...);
    }
  };
  auto bytes = [&](const Bytes& v, auto... j) __attribute__((always_inline)) {
    if constexpr (kFormat == kE4M3 || kFormat == kE5M2) {
      each_fp8<Simd, kFormat>(v, fn, j...);
    } else {
      (fn(j, Simd::to_float(Simd::template field<j % 4 * 8, 8>(v))), ...);
    }
  };
  if constexpr (kFormat == kInt4 || kFormat == kNF4 || (kFormat == kE2M1 && Simd::kFastLookup)) {
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

// A group of a few rows, straight from the codes. Zero points are taken off each number, not off the sum: of an infinite
// activation that would be inf - inf.
template <Format kFormat, bool kAsymmetric, int kRows>
__attribute__((noinline)) void float_rows(const Job& job, int64_t block, int64_t row) {
  constexpr int kSets = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;  // sums in parallel, to hide the latency of fma
  const uint8_t* codes = job.codes + block * job.block_bytes();
  const float* x = reinterpret_cast<const float*>(job.rows + row * job.row_stride);
  Floats out[kRows];
  for (Floats& v : out) v = Simd::fset(0);
  for (int64_t t = 0; t < job.tiles; ++t) {
    Floats sums[kSets][kRows];
    for (auto& set : sums) {
      for (Floats& v : set) v = Simd::fset(0);
    }
    const Floats zeros = kAsymmetric ? signed_zeros(job, block, t) : Simd::fset(0);
    for (int64_t s = job.steps_of_tile(t); s > 0; --s, codes += kStepBytes, x += step_k(kFormat) * kRows) {
      prefetch(codes, kStreamAhead);
      each_k<kFormat>(codes, [&](auto j, Floats w) __attribute__((always_inline)) {
        if constexpr (kAsymmetric) w = Simd::fsub(w, zeros);
        repeat<kRows>([&](auto r) __attribute__((always_inline)) {
          Floats& sum = sums[j % kSets][r];
          sum = Simd::fma(w, Simd::fset(x[j * kRows + r]), sum);
        });
      });
    }
    Floats scale = load_scale(job, block, t);
    if constexpr (kFormat == kE2M1) scale = Simd::fmul(scale, Simd::fset(unit(kFormat)));
    for (int r = 0; r < kRows; ++r) {
      Floats sum = sums[0][r];
      for (int i = 1; i < kSets; ++i) sum = Simd::fadd(sum, sums[i][r]);
      out[r] = Simd::fma(sum, scale, out[r]);
    }
  }
  const Output output(job, block);
  for (int r = 0; r < kRows; ++r) output.store(row + r, out[r]);
}

// The same of one row of nf4, on layers that have `FourK`.
template <class Layer>
void four_k_row(const Job& job, int64_t block) {
  const uint8_t* codes = job.codes + block * job.block_bytes();
  const float* x = reinterpret_cast<const float*>(job.rows);
  Floats out = Simd::fset(0);
  typename Layer::FourK sums(kNF4Points);
  for (int64_t t = 0; t < job.tiles; ++t) {
    sums.clear();
    for (int64_t s = job.steps_of_tile(t); s > 0; --s, codes += kStepBytes, x += 8) {
      prefetch(codes, kStreamAhead);
      const Bytes loaded = Simd::load_bytes(codes);
      sums.add(Simd::low_nibbles(loaded), x);
      sums.add(Simd::high_nibbles(loaded), x + 4);
    }
    out = Simd::fma(sums.total(), load_scale(job, block, t), out);
  }
  Output(job, block).store(0, out);
}

// Many rows: a part of the block is dequantized once, to (k, 16) floats.
template <Format kFormat>
void dequantize_part(const Job& job, int64_t block, const Part& part, int64_t ahead, float* panel) {
  const int64_t steps = job.steps;
  for (int64_t t = part.tile; t < part.tile_end; ++t) {
    Floats scale = load_scale(job, block, t);
    if constexpr (kFormat == kE2M1) scale = Simd::fmul(scale, Simd::fset(unit(kFormat)));
    const bool asymmetric = is_integer(kFormat) && job.zeros != nullptr;
    const Floats zeros = asymmetric ? signed_zeros(job, block, t) : Simd::fset(0);
    const uint8_t* codes = job.codes + block * job.block_bytes() + (t * steps + part.step) * kStepBytes;
    for (int64_t s = part.step; s < part.step_end; ++s, codes += kStepBytes) {
      prefetch(codes, ahead);
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
  const Output output(job, block);
  if (part.last) output.prefetch(row, kRows);
  const float* x = reinterpret_cast<const float*>(job.rows + row * job.row_stride) + k_begin * kRows;
  add_products<kRows, 1, kRows>(x, panel, k_count, out);
  if (part.last) {
    for (int r = 0; r < kRows; ++r) output.store(row + r, out[r]);
  } else {
    for (int r = 0; r < kRows; ++r) Simd::fstore(waiting[r].floats, out[r]);
  }
}

constexpr int64_t kPanelK = 256;

template <Format kFormat>
void float_product(const Job& job, const Range& range, char* workspace) {
  if (job.m <= Simd::kFewRows) {
    for (int64_t block = range.block; block < range.block_end; ++block) {
      if constexpr (kFormat == kNF4 && Simd::kFourK) {
        if (job.m == 1) {
          four_k_row<Simd>(job, block);
          continue;
        }
      }
      with_size<Simd::kFewRows>(range.end - range.begin, [&](auto count) {
        constexpr int kRows = decltype(count)::value;
        if constexpr (is_integer(kFormat)) {
          if (job.zeros != nullptr) return float_rows<kFormat, true, kRows>(job, block, range.begin);
        }
        float_rows<kFormat, false, kRows>(job, block, range.begin);
      });
    }
    return;
  }
  float* panel = reinterpret_cast<float*>(workspace + kWaitingBytes);
  each_pass(job, range, kPanelK / step_k(kFormat), reinterpret_cast<Waiting*>(workspace),
            [&](const Part& part, int64_t block, int64_t ahead, Waiting* sums) {
              dequantize_part<kFormat>(job, block, part, ahead, panel);
              const int64_t k = part.tile * job.padded_tile + part.step * step_k(kFormat);
              each_group(job, range.begin, range.end, [&](int64_t row, int64_t size) {
                with_size<Simd::kPanelRows>(size, [&](auto count) {
                  panel_rows<decltype(count)::value>(job, block, row, part, panel, k, part.steps() * step_k(kFormat),
                                                     sums + (row - range.begin));
                });
              });
            });
}

}  // namespace
}  // namespace qwix
