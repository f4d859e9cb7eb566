// Products of two rows or more on AMX's tiles, see intrinsics_amx.h. A step of a packed block, four bytes of k for each of 16
// columns, is a row of the tile that AMX multiplies with.
//
// Integers are multiplied as signed bytes. Floats are multiplied in bfloat16 without losing anything of float32:
// a float32 is the sum of three bfloat16, of 8 bits each (cut off, not rounded); a quantized weight (but for nf4's) is
// one as it is, its scale comes after. So three products, exact in float32, make one, and of nf4, which has three
// parts too, the six of at least 2^-16 of it.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "intrinsics_amx.h"

namespace qwix {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int kA = 4, kB = 6;  // of the tile registers, two each; those below are sums

bool uses_tiles(const Job& job) {
  // An infinity (which e5m2 has) times the second part of an activation, 0, would be NaN.
  return job.m > 8 && (job.integer() || job.format != kE5M2);
}

// The k that one instruction contracts, of one tile of the weight.
struct Chunks {
  int64_t k, count, bytes;  // of k, count of those in a tile, bytes of a row of activations

  explicit Chunks(const Job& job) {
    k = std::min<int64_t>(job.integer() ? 64 : 32, job.padded_tile);
    count = (job.padded_tile + k - 1) / k;
    bytes = job.integer() ? k : 2 * k;
  }
  int64_t padded() const { return k * count; }  // tile; activations are 0 there, and so are weights
};

int parts_of_x(const Job& job) { return job.integer() || job.x_type == Type::kBF16 ? 1 : 3; }

template <class Fn>
void each_tile_group(int64_t begin, int64_t end, Fn fn) {
  for (int64_t row = begin; row < end; row += kTileRows) fn(row, std::min(kTileRows, end - row));
}

// ------------------------------------------------------------------------------------------- activations

// A power of two that brings a magnitude near 1, so that no part is denormal, which AMX takes for 0.
float normalizer(float magnitude) {
  uint32_t bits;
  std::memcpy(&bits, &magnitude, 4);
  const int32_t exponent = static_cast<int32_t>(bits >> 23);
  if (exponent == 0xff) return 1.0f;
  bits = static_cast<uint32_t>(std::clamp(254 - exponent, 1, 252)) << 23;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// 16 bfloat16 to out, those of `count` numbers.
void store_bf16(char* out, __m512i upper_halves, int64_t count) {
  const __m256i part = _mm512_cvtepi32_epi16(_mm512_srli_epi32(upper_halves, 16));
  if (count == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), part);
  } else {
    char bytes[32];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), part);
    std::memcpy(out, bytes, static_cast<size_t>(2 * count));
  }
}

// `parts` bfloat16 whose sum is each of 16 floats, to out, out + stride, ...
void split(Floats x, int parts, int64_t count, char* out, int64_t stride) {
  const __m512i exponent = _mm512_set1_epi32(0x7f800000), upper = _mm512_set1_epi32(-65536);
  __m512i bits = _mm512_castps_si512(x.v);
  // Of inf and NaN there is one part; what is left of a NaN in the upper half has to be one.
  const __mmask16 finite = _mm512_cmpneq_epi32_mask(_mm512_and_si512(bits, exponent), exponent);
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(_mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)), exponent);
  bits = _mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x400000));
  for (int p = 0; p < parts; ++p, out += stride) {
    const __m512i part = _mm512_and_si512(bits, upper);
    store_bf16(out, part, count);
    bits = _mm512_maskz_mov_epi32(
        finite, _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_castsi512_ps(part))));
  }
}

void prepare_tiles_of_floats(const Job& job, const Chunks& chunks, int64_t row, int parts, int64_t rows, char* out) {
  for (int64_t t = 0; t < job.tiles; ++t) {
    const float factor = parts == 1 ? 1.0f : normalizer(largest_magnitude(job, row, t * job.tile));
    job.row_scale[row * job.tiles + t] = 1.0f / factor;
    for (int64_t i = 0; i < chunks.padded(); i += 16) {
      const int64_t at = i % chunks.k;
      const int64_t count = std::clamp<int64_t>(job.tile - i, 0, 16);
      const Floats x = Simd::fmul(load_x(job, row, t * job.tile + i, count), Simd::fset(factor));
      char* chunk = out + (t * chunks.count + i / chunks.k) * parts * rows * chunks.bytes;
      split(x, parts, std::min<int64_t>(16, chunks.k - at), chunk + 2 * at, rows * chunks.bytes);
    }
  }
}

// Rows lie by groups: for each chunk, for each part, the rows one after the other.
void prepare_tiles(const Job& job, int64_t begin, int64_t end) {
  const Chunks chunks(job);
  const int parts = parts_of_x(job);
  each_tile_group(begin, end, [&](int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      char* out = job.rows + first * job.row_stride + r * chunks.bytes;
      if (!job.integer()) {
        prepare_tiles_of_floats(job, chunks, first + r, parts, rows, out);
        continue;
      }
      quantize_row(job, first + r, chunks.padded(), [&](int64_t t, int64_t i, Ints codes) {
        char* chunk = out + (t * chunks.count + i / chunks.k) * rows * chunks.bytes + i % chunks.k;
        if (chunks.k - i % chunks.k >= 16) return Simd::store_codes(chunk, codes);
        char sixteen[16];
        Simd::store_codes(sixteen, codes);
        std::memcpy(chunk, sixteen, 8);  // chunks have a multiple of 8 k
      });
    }
  });
}

// ------------------------------------------------------------------------------------------- weights

constexpr int8_t kSignedNibbles[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

// A step as signed bytes, those of 4 k in 64.
template <Format kFormat>
inline __attribute__((always_inline)) void signed_step(const uint8_t* codes, uint8_t* out) {
  const Bytes loaded = Simd::load_bytes(codes);
  if constexpr (is_nibble(kFormat)) {
    constexpr auto& table = kFormat == kE2M1 ? kE2M1Twice : kSignedNibbles;
    Simd::store_bytes(out, Simd::lookup(table, Simd::low_nibbles(loaded)));
    Simd::store_bytes(out + kStepBytes, Simd::lookup(table, Simd::high_nibbles(loaded)));
  } else {
    Simd::store_bytes(out, Simd::flip(loaded, 0x80));
  }
}

// A step in bfloat16, those of 2 k in 64 bytes, without zero points; a part of all its numbers, then the next one.
template <Format kFormat, int kParts>
inline __attribute__((always_inline)) void bf16_step(const uint8_t* codes, Floats zeros, int64_t part_bytes, uint8_t* out) {
  Ints even[kParts];
  each_k<kFormat>(codes, [&](auto j, Floats w) __attribute__((always_inline)) {
    Floats rest = is_integer(kFormat) ? Simd::fsub(w, zeros) : w;
    for (int p = 0; p < kParts; ++p) {
      const __m512i upper = _mm512_and_si512(_mm512_castps_si512(rest.v), _mm512_set1_epi32(-65536));
      if (p + 1 < kParts) rest = Simd::fsub(rest, Floats{_mm512_castsi512_ps(upper)});
      if (j % 2 == 0) {
        even[p].v = _mm512_srli_epi32(upper, 16);
      } else {
        Simd::store_bytes(out + p * part_bytes + j / 2 * kStepBytes, Bytes{_mm512_or_si512(even[p].v, upper)});
      }
    }
  });
}

// A part of a block as tiles are loaded from it: chunk after chunk (of each the parts), those of a tile padded with zeros.
template <Format kFormat, bool kIntegers, int kParts>
void tile_panel(const Job& job, const Chunks& chunks, int64_t block, const Part& part, int64_t ahead, uint8_t* panel) {
  const int64_t chunk_steps = chunks.k / step_k(kFormat);
  const int64_t step_bytes = step_k(kFormat) * kColumns * (kIntegers ? 1 : 2), part_bytes = chunk_steps * step_bytes;
  for (int64_t t = part.tile; t < part.tile_end; ++t) {
    const int64_t steps = job.steps_of_tile();
    const uint8_t* codes = job.codes + block * job.block_bytes() + (t * steps + part.step) * kStepBytes;
    Floats zeros = Simd::fset(0);
    if constexpr (is_integer(kFormat) && !kIntegers) {
      if (job.zeros != nullptr) zeros = signed_zeros(job, block, t);
    }
    for (int64_t s = part.step; s < part.step_end; s += chunk_steps, panel += kParts * part_bytes) {
      const int64_t count = std::min(chunk_steps, part.step_end - s);
      uint8_t* out = panel;
      for (int64_t i = 0; i < count; ++i, codes += kStepBytes, out += step_bytes) {
        prefetch(codes, ahead);
        if constexpr (kIntegers) {
          signed_step<kFormat>(codes, out);
        } else {
          bf16_step<kFormat, kParts>(codes, zeros, part_bytes, out);
        }
      }
      for (int p = 0; p < kParts && count < chunk_steps; ++p) {
        std::memset(out + p * part_bytes, 0, static_cast<size_t>((chunk_steps - count) * step_bytes));
      }
    }
  }
}

// ------------------------------------------------------------------------------------------- the product

constexpr int64_t kTilePanelBytes = 48 * 1024;  // of a block

void configure(const Chunks& chunks, int64_t rows) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(i < kB ? rows : chunks.bytes / 4);
    config.row_bytes[i] = static_cast<uint16_t>(i >= kA && i < kB ? chunks.bytes : kStepBytes);
  }
  Tiles::configure(config);
}

// Adds the products of a chunk to the sums of one block, or of two beside each other.
template <bool kIntegers, int kXParts, int kWParts, int kBlocks>
inline __attribute__((always_inline)) void add_chunk(const char* acts, int64_t act_bytes, int64_t row_bytes,
                                                     const uint8_t* panel, int64_t panel_bytes) {
  for (int w = 0; w < kWParts; ++w) {
    const uint8_t* part = panel + w * row_bytes * kColumns;
    Tiles::load<kB>(part, kStepBytes);
    if constexpr (kBlocks == 2) Tiles::load<kB + 1>(part + panel_bytes, kStepBytes);
    for (int x = 0; x + w < std::max(kXParts, kWParts) && x < kXParts; ++x) {
      Tiles::load<kA>(acts + x * act_bytes, row_bytes);
      Tiles::add<kIntegers, 0, kA, kB>();
      if constexpr (kBlocks == 2) Tiles::add<kIntegers, 1, kA, kB + 1>();
    }
  }
}

// The result of a group of rows for a part of a block, or of two: `sums_of_block` apart is what waits of the second one,
// kTilePanelBytes what is multiplied. kRows is 16, or 0: `rows`, fewer.
template <Format kFormat, bool kIntegers, int kXParts, int kWParts, int kBlocks, int kRows>
void tile_rows(const Job& job, const Chunks& chunks, int64_t block, int64_t row, int64_t rows, const Part& part,
               const uint8_t* panel, Waiting* waiting, int64_t sums_of_block) {
  if (kRows != 0) rows = kRows;
  alignas(64) int32_t sums[kBlocks][kTileRows][kColumns];
  const int64_t act_bytes = rows * chunks.bytes, part_k = (part.step_end - part.step) * step_k(kFormat);
  const int64_t first = part.step * step_k(kFormat) / chunks.k, count = (part_k + chunks.k - 1) / chunks.k;
  const bool is_whole = part.step_end == job.steps_of_tile();
  for (int b = 0; part.first && b < kBlocks; ++b) {
    for (int64_t r = 0; r < rows; ++r) Simd::fstore(waiting[b * sums_of_block + r].floats, Simd::fset(0));
  }
  for (int64_t t = part.tile; t < part.tile_end; ++t) {
    const char* acts = job.rows + row * job.row_stride + (t * chunks.count + first) * kXParts * act_bytes;
    if (part.step == 0) {
      Tiles::zero<0>();
      if constexpr (kBlocks == 2) Tiles::zero<1>();
    } else {
      Tiles::load<0>(waiting[0].ints, sizeof(Waiting));
      if constexpr (kBlocks == 2) Tiles::load<1>(waiting[sums_of_block].ints, sizeof(Waiting));
    }
    for (int64_t c = 0; c < count; ++c, acts += kXParts * act_bytes, panel += kWParts * chunks.bytes * kColumns) {
      add_chunk<kIntegers, kXParts, kWParts, kBlocks>(acts, act_bytes, chunks.bytes, panel, kTilePanelBytes);
    }
    if (!is_whole) {
      Tiles::store<0>(waiting[0].ints, sizeof(Waiting));
      if constexpr (kBlocks == 2) Tiles::store<1>(waiting[sums_of_block].ints, sizeof(Waiting));
      return;  // such a part is of one tile
    }
    Tiles::store<0>(sums[0], kStepBytes);
    if constexpr (kBlocks == 2) Tiles::store<1>(sums[1], kStepBytes);
    const float* row_scale = job.row_scale + row * job.tiles + t;
    for (int b = 0; b < kBlocks; ++b) {
      Floats scale = load_scale(job, block + b, t);
      if constexpr (kFormat == kE2M1) scale = Simd::fmul(scale, Simd::fset(unit(kFormat)));
      Waiting* out = waiting + b * sums_of_block;
      auto finish = [&](auto to_float) __attribute__((always_inline)) {
        for (int64_t r = 0; r < rows; ++r) {
          const Floats scaled = Simd::fmul(to_float(r), Simd::fset(row_scale[r * job.tiles]));
          Simd::fstore(out[r].floats, Simd::fma(scaled, scale, Simd::fload(out[r].floats)));
        }
      };
      if constexpr (!kIntegers) {
        finish([&](int64_t r) { return Simd::fload(reinterpret_cast<const float*>(sums[b][r])); });
      } else if (kFormat == kE2M1 || job.zeros == nullptr) {
        finish([&](int64_t r) { return Simd::to_float(Simd::iload(sums[b][r])); });
      } else {
        const Ints zeros = Simd::isub(load_zeros(job, block + b, t), Simd::iset(code_of_zero(kFormat)));
        const int32_t* row_sum = job.row_sum + row * job.tiles + t;
        finish([&](int64_t r) {
          const Ints correction = Simd::imul(zeros, Simd::iset(row_sum[r * job.tiles]));
          return Simd::to_float(Simd::isub(Simd::iload(sums[b][r]), correction));
        });
      }
    }
  }
  if (!part.last) return;
  for (int b = 0; b < kBlocks; ++b) {
    for (int64_t r = 0; r < rows; ++r) {
      store_output(job, row + r, block + b, Simd::fload(waiting[b * sums_of_block + r].floats));
    }
  }
}

template <Format kFormat, bool kIntegers, int kXParts>
void tile_product(const Job& job, const Range& range, char* workspace) {
  constexpr int kWParts = kFormat == kNF4 ? 3 : 1;
  constexpr int64_t kPart = kIntegers ? 1024 : kWParts == 1 ? 512 : 256;  // k
  static_assert(kPart * kColumns * (kIntegers ? 1 : 2 * kWParts) * 2 <= kTilePanelBytes);  // a tile is padded to less than twice
  const Chunks chunks(job);
  Waiting* waiting = reinterpret_cast<Waiting*>(workspace);
  uint8_t* panel = reinterpret_cast<uint8_t*>(workspace + kWaitingBytes);
  const int64_t rows = range.end - range.begin;
  int64_t configured = 0;
  // A part of all rows of two blocks.
  auto multiply = [&](const Part& part, auto blocks, int64_t block, int64_t ahead, Waiting* sums) {
    constexpr int kBlocks = decltype(blocks)::value;
    for (int b = 0; b < kBlocks; ++b) {
      tile_panel<kFormat, kIntegers, kWParts>(job, chunks, block + b, part, ahead, panel + b * kTilePanelBytes);
    }
    Tiles::fence();
    each_tile_group(range.begin, range.end, [&](int64_t row, int64_t size) {
      if (size != configured) configure(chunks, configured = size);
      Waiting* of_group = sums + (row - range.begin);
      if (size == kTileRows) {
        tile_rows<kFormat, kIntegers, kXParts, kWParts, kBlocks, kTileRows>(job, chunks, block, row, size, part, panel,
                                                                           of_group, rows);
      } else {
        tile_rows<kFormat, kIntegers, kXParts, kWParts, kBlocks, 0>(job, chunks, block, row, size, part, panel, of_group,
                                                                   rows);
      }
    });
  };
  // One group of rows reads a block from end to end; more of them take a part of some blocks in turn, while it is in the cache.
  const int64_t blocks_of_pass = rows <= kTileRows ? 2 : kBlocksOfPass;
  for (int64_t start = range.block; start < range.block_end; start += blocks_of_pass) {
    const int64_t end = std::min(range.block_end, start + blocks_of_pass);
    each_part(job, kPart / step_k(kFormat), [&](const Part& part) {
      for (int64_t block = start; block < end; block += 2) {
        const int64_t ahead = rows <= kTileRows ? kStreamAhead : 2 * job.block_bytes();
        Waiting* sums = waiting + (block - start) * rows;
        if (block + 1 < end) {
          multiply(part, K<2>(), block, ahead, sums);
        } else {
          multiply(part, K<1>(), block, ahead, sums);
        }
      }
    });
  }
  Tiles::release();
}

template <Format kFormat>
void multiply_tiles_of(const Job& job, const Range& range, char* workspace) {
  if constexpr (is_integer(kFormat)) {
    if (job.integer()) return tile_product<kFormat, true, 1>(job, range, workspace);
  }
  if (parts_of_x(job) == 1) return tile_product<kFormat, false, 1>(job, range, workspace);
  tile_product<kFormat, false, 3>(job, range, workspace);
}

int64_t most_rows_or_tiles(const Job& job) { return uses_tiles(job) ? kTileRows : avx512_vnni_kernels().most_rows(job); }

int64_t row_bytes_or_tiles(const Job& job) {
  if (!uses_tiles(job)) return avx512_vnni_kernels().row_bytes(job);
  const Chunks chunks(job);
  return job.tiles * chunks.count * chunks.bytes * parts_of_x(job);
}

void prepare_or_tiles(const Job& job, int64_t begin, int64_t end) {
  uses_tiles(job) ? prepare_tiles(job, begin, end) : avx512_vnni_kernels().prepare(job, begin, end);
}

void multiply_or_tiles(const Job& job, int64_t block, int64_t block_end, int64_t begin, int64_t end, char* workspace) {
  if (!uses_tiles(job)) return avx512_vnni_kernels().multiply(job, block, block_end, begin, end, workspace);
  const Range range = {block, block_end, begin, end};
  switch (job.format) {
    case kInt8: return multiply_tiles_of<kInt8>(job, range, workspace);
    case kInt4: return multiply_tiles_of<kInt4>(job, range, workspace);
    case kE2M1: return multiply_tiles_of<kE2M1>(job, range, workspace);
    case kNF4: return multiply_tiles_of<kNF4>(job, range, workspace);
    case kE4M3: return multiply_tiles_of<kE4M3>(job, range, workspace);
    case kE5M2: return;  // not on tiles
  }
}

static_assert(kWaitingBytes + 2 * kTilePanelBytes <= kWorkspaceBytes);

}  // namespace
}  // namespace qwix
