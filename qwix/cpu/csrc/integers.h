// Products of codes with int8 activations, exact in 32 bits within a tile.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace qwix {
namespace {

// The first or second 4 k of a step of 4 bits, a byte each.
template <Format kFormat, int kGroup>
inline __attribute__((always_inline)) Bytes nibbles(const Bytes& loaded) {
  const Bytes codes = kGroup == 0 ? Simd::low_nibbles(loaded) : Simd::high_nibbles(loaded);
  if constexpr (kFormat == kE2M1) return Simd::lookup(kE2M1Codes, codes);
  return codes;
}

// A part of a block as it is multiplied by more than one group of rows: with a byte for each code. `ahead` bytes after
// each code lies one that is wanted next.
template <Format kFormat>
void decode_part(const uint8_t* codes, int64_t steps, int64_t ahead, uint8_t* panel) {
  for (; steps > 0; --steps, codes += kStepBytes, panel += 2 * kStepBytes) {
    prefetch(codes, ahead);
    const Bytes loaded = Simd::load_bytes(codes);
    Simd::store_bytes(panel, nibbles<kFormat, 0>(loaded));
    Simd::store_bytes(panel + kStepBytes, nibbles<kFormat, 1>(loaded));
  }
}

// Sums of a group of rows: several of each, which do not wait for each other, if there are few rows.
template <class Dot, int kRows>
struct Sums {
  static constexpr int kSets = kRows >= Dot::kChains ? 1 : 2 * kRows >= Dot::kChains ? 2 : 4;
  typename Dot::Partial sets[kSets][kRows];

  inline __attribute__((always_inline)) Sums() {
    repeat<kSets * kRows>([&](auto i) __attribute__((always_inline)) { sets[i / kRows][i % kRows] = Dot::zero(); });
  }

  // The products of 4 k, to one of the sets.
  template <int kSet>
  inline __attribute__((always_inline)) void add(const Bytes& codes, const char* acts) {
    repeat<kRows>([&](auto r) __attribute__((always_inline)) {
      Dot::add(sets[kSet % kSets][r], codes, acts + r * Dot::kGroupBytes);
    });
  }

  inline __attribute__((always_inline)) void add_to(Ints (&out)[kRows]) const {
    repeat<kSets * kRows>([&](auto i) __attribute__((always_inline)) {
      out[i % kRows] = Simd::iadd(out[i % kRows], Dot::sums(sets[i / kRows][i % kRows]));
    });
  }
};

// The result of a group of rows for a part of a block. `codes` are those of the part: decoded, or as they are
// packed, with those that are wanted next `ahead` bytes after them. (As a part of a large function, GCC 12 would have it
// keep sums in memory.)
template <Format kFormat, class Dot, int kRows, bool kDecoded>
__attribute__((noinline)) void integer_rows(const Job& job, int64_t block, int64_t row, const Part& part,
                                            const uint8_t* codes, int64_t ahead, Waiting* waiting) {
  constexpr int kGroups = step_k(kFormat) / 4;  // of 4 k, in a step
  constexpr int64_t kFlush = Dot::kFlushGroups / kGroups / (kFormat == kE2M1 ? 2 : 1);
  constexpr int kUnroll = std::max(1, Sums<Dot, kRows>::kSets / kGroups);  // steps
  constexpr int64_t kGroupActs = kRows * Dot::kGroupBytes;
  constexpr bool kLimited = is_full(kFormat) && FullDot::kSaturates;
  const int64_t steps = job.steps;
  const bool ends_tile = part.ends_tile;  // read from `part`, it would be again after each sum that is stored
  const Limited<Dot> limited(job, row, kRows);
  const char* const all_acts = kLimited ? limited.codes() : job.rows + row * job.row_stride;
  const uint8_t* const block_codes = job.codes + block * job.block_bytes();
  Floats out[kRows];
  repeat<kRows>([&](auto r) __attribute__((always_inline)) {
    out[r] = part.first ? Simd::fset(0) : Simd::fload(waiting[r].floats);
  });
  const Output output(job, block);
  if (part.last) output.prefetch(row, kRows);
  [[maybe_unused]] const typename Limited<Dot>::Extra* extra = nullptr;
  if constexpr (Dot::kSaturates) extra = limited.first_extra(part.tile * steps + part.step);
  for (int64_t t = part.tile; t < part.tile_end; ++t) {
    const char* acts = all_acts + (t * steps + part.step) * kGroups * kGroupActs;
    Ints sums[kRows];
    repeat<kRows>([&](auto r) __attribute__((always_inline)) {
      sums[r] = part.step == 0 ? Simd::iset(0) : Simd::iload(waiting[r].ints);
    });
    for (int64_t s = part.step; s < part.step_end;) {
      const int64_t end = std::min(part.step_end, s + kFlush);
      Sums<Dot, kRows> partial;
      auto step = [&](auto set) __attribute__((always_inline)) {
        constexpr int kSet = decltype(set)::value;
        if constexpr (!kDecoded) prefetch(codes, ahead);
        const Bytes loaded = Simd::load_bytes(codes);
        if constexpr (!is_nibble(kFormat)) {
          partial.template add<kSet>(loaded, acts);
        } else if constexpr (kDecoded) {
          partial.template add<kSet>(loaded, acts);
          partial.template add<kSet + 1>(Simd::load_bytes(codes + kStepBytes), acts + kGroupActs);
        } else {
          partial.template add<kSet>(nibbles<kFormat, 0>(loaded), acts);
          partial.template add<kSet + 1>(nibbles<kFormat, 1>(loaded), acts + kGroupActs);
        }
        codes += (kDecoded ? kGroups : 1) * kStepBytes;
        acts += kGroups * kGroupActs;
      };
      if constexpr (kUnroll > 1) {
        for (; s + kUnroll <= end; s += kUnroll) {
          step(K<0>());
          step(K<kGroups>());
          if constexpr (kUnroll == 4) {
            step(K<2>());
            step(K<3>());
          }
        }
      }
      for (; s < end; ++s) step(K<0>());
      partial.add_to(sums);
    }
    if (Dot::kSaturates || !ends_tile) {
      repeat<kRows>([&](auto r) __attribute__((always_inline)) { Simd::istore(waiting[r].ints, sums[r]); });
    }
    if constexpr (Dot::kSaturates) {
      limited.add_extras(extra, t * steps + part.step, t * steps + part.step_end, block_codes, waiting);
      repeat<kRows>([&](auto r) __attribute__((always_inline)) { sums[r] = Simd::iload(waiting[r].ints); });
    }
    if (!ends_tile) continue;
    Floats scale = load_scale(job, block, t);
    if constexpr (kFormat == kE2M1) scale = Simd::fmul(scale, Simd::fset(unit(kFormat)));
    const bool asymmetric = kFormat != kE2M1 && job.zeros != nullptr;
    const Ints zeros = asymmetric ? Simd::isub(load_zeros(job, block, t), Simd::iset(Dot::kOffset)) : Simd::iset(0);
    repeat<kRows>([&](auto r) __attribute__((always_inline)) {
      const int64_t i = (row + r) * job.tiles + t;
      const uint32_t row_sum = static_cast<uint32_t>(job.row_sum[i]);
      const uint32_t zero = static_cast<uint32_t>(code_of_zero(kFormat) - Dot::kOffset);
      const Ints correction = asymmetric ? Simd::imul(zeros, Simd::iset(job.row_sum[i]))
                                         : Simd::iset(static_cast<int32_t>(row_sum * zero));
      const Floats exact = Simd::to_float(Simd::isub(sums[r], correction));
      const Floats scaled = Simd::fmul(exact, Simd::fset(job.row_scale[i]));
      out[r] = Simd::fma(scaled, scale, out[r]);
    });
  }
  if (part.last) {
    repeat<kRows>([&](auto r) __attribute__((always_inline)) { output.store(row + r, out[r]); });
  } else {
    repeat<kRows>([&](auto r) __attribute__((always_inline)) { Simd::fstore(waiting[r].floats, out[r]); });
  }
}

template <Format kFormat, bool kDecoded>
void integer_group(const Job& job, int64_t block, int64_t row, int64_t rows, const Part& part, const uint8_t* codes,
                   int64_t ahead, Waiting* waiting) {
  using Dot = Simd::Dot<is_full(kFormat)>;
  with_size<Simd::kRows>(rows, [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    if constexpr (Dot::kSaturates) {
      if (Limited<Dot>(job, row, rows).is_widened()) {
        return integer_rows<kFormat, typename Dot::Widened, kRows, kDecoded>(job, block, row, part, codes, ahead, waiting);
      }
    }
    integer_rows<kFormat, Dot, kRows, kDecoded>(job, block, row, part, codes, ahead, waiting);
  });
}

// The k of a part, where there are several groups of rows: their activations fit the first cache, with a decoded panel if
// there is one.
constexpr int64_t kPanelPartK = 1024;
constexpr int64_t k_of_part(Format f) { return is_nibble(f) ? kPanelPartK : 2048; }

template <Format kFormat>
void integer_product(const Job& job, const Range& range, char* workspace) {
  Waiting* waiting = reinterpret_cast<Waiting*>(workspace);
  const int64_t rows = range.end - range.begin;
  if (group_size(Simd::kRows, rows) == rows) {
    // In parts only as extras follow while their codes are in the cache; a single row has few of them.
    const bool in_parts = Simd::Dot<is_full(kFormat)>::kSaturates && rows > 1;
    const int64_t most = in_parts ? k_of_part(kFormat) / step_k(kFormat) : INT64_MAX;
    for (int64_t block = range.block; block < range.block_end; ++block) {
      const uint8_t* codes = job.codes + block * job.block_bytes();
      each_part(job, most, [&](const Part& part) {
        integer_group<kFormat, false>(job, block, range.begin, rows, part, codes, kStreamAhead, waiting);
        codes += part.steps() * kStepBytes;
      });
    }
    return;
  }
  const int64_t stride = job.block_bytes(), most = k_of_part(kFormat) / step_k(kFormat);
  auto at = [&](const Part& part) { return (part.tile * job.steps + part.step) * kStepBytes; };
  if constexpr (is_nibble(kFormat)) {
    uint8_t* panel = reinterpret_cast<uint8_t*>(workspace + kWaitingBytes);
    each_pass(job, range, most, waiting, [&](const Part& part, int64_t block, int64_t ahead, Waiting* sums) {
      decode_part<kFormat>(job.codes + block * stride + at(part), part.steps(), ahead, panel);
      each_group(job, range.begin, range.end, [&](int64_t row, int64_t size) {
        integer_group<kFormat, true>(job, block, row, size, part, panel, ahead, sums + (row - range.begin));
      });
    });
    return;
  }
  // With nothing to decode, a group of rows meets all blocks of a pass while its activations are in the first cache.
  for (int64_t start = range.block; start < range.block_end; start += kBlocksOfPass) {
    const int64_t end = std::min(range.block_end, start + kBlocksOfPass);
    each_part(job, most, [&](const Part& part) {
      each_group(job, range.begin, range.end, [&](int64_t row, int64_t size) {
        for (int64_t block = start; block < end; ++block) {
          integer_group<kFormat, false>(job, block, row, size, part, job.codes + block * stride + at(part), stride,
                                        waiting + (block - start) * rows + row - range.begin);
        }
      });
    });
  }
}

}  // namespace
}  // namespace qwix
