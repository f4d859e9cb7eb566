// Products of more than 8 rows on AMX's tiles, see intrinsics_amx.h. 16 steps of a packed block, each four bytes of k
// for each of 16 columns, are a tile as AMX multiplies with it.
//
// Integers are multiplied as bytes: int8 as it is packed, unsigned, straight from there; others signed. Floats are
// multiplied in bfloat16 without losing anything of float32: a float32 is the sum of three bfloat16, of 8 bits each
// (cut off, not rounded); a quantized weight (but for nf4's) is one as it is, its scale comes after. So three
// products, exact in float32, make one; and of nf4, which has three parts too, the six that are not below 2^-21 of
// it.

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
  const __m256i part = _mm512_cvtsepi32_epi16(_mm512_srai_epi32(upper_halves, 16));
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
  const __mmask16 finite = ~_mm512_cmpeq_epi32_mask(_mm512_and_si512(bits, exponent), exponent);
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
    with_elements(job, row, t * job.tile, [&](const auto& x) {
      const float factor = parts == 1 ? 1.0f : normalizer(largest_magnitude(x, job.k_of_tile(t)));
      job.row_scale[row * job.tiles + t] = 1.0f / factor;
      for (int64_t i = 0; i < chunks.padded(); i += 16) {
        const int64_t at = i % chunks.k;
        const Floats scaled = Simd::fmul(x.at(i, std::clamp<int64_t>(job.k_of_tile(t) - i, 0, 16)), Simd::fset(factor));
        char* chunk = out + (t * chunks.count + i / chunks.k) * parts * rows * chunks.bytes;
        split(scaled, parts, std::min<int64_t>(16, chunks.k - at), chunk + 2 * at, rows * chunks.bytes);
      }
    });
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

// A step as bytes, those of 4 k in 64.
template <Format kFormat>
inline __attribute__((always_inline)) void byte_step(const uint8_t* codes, uint8_t* out) {
  const Bytes loaded = Simd::load_bytes(codes);
  if constexpr (is_nibble(kFormat)) {
    constexpr auto& table = kFormat == kE2M1 ? kE2M1Twice : kSignedNibbles;
    Simd::store_bytes(out, Simd::lookup(table, Simd::low_nibbles(loaded)));
    Simd::store_bytes(out + kStepBytes, Simd::lookup(table, Simd::high_nibbles(loaded)));
  } else {
    Simd::store_bytes(out, loaded);
  }
}

// A step in bfloat16, those of 2 k in 64 bytes, without zero points.
template <Format kFormat>
inline __attribute__((always_inline)) void bf16_step(const uint8_t* codes, Floats zeros, uint8_t* out) {
  __m512i even;
  each_k<kFormat>(codes, [&](auto j, Floats w) __attribute__((always_inline)) {
    const __m512i bits = _mm512_castps_si512(is_integer(kFormat) ? Simd::fsub(w, zeros).v : w.v);
    if (j % 2 == 0) {
      even = _mm512_srli_epi32(bits, 16);
    } else {
      const __m512i odd = _mm512_and_si512(bits, _mm512_set1_epi32(-65536));
      Simd::store_bytes(out + j / 2 * kStepBytes, Bytes{_mm512_or_si512(even, odd)});
    }
  });
}

// The numbers of a format of 4 bits by code, twice: the instruction that looks them up heeds 5 bits.
struct NibbleTable {
  uint16_t parts[3][32];

  explicit NibbleTable(Format format) {
    for (int i = 0; i < 32; ++i) {
      const float number = format == kNF4    ? kNF4Points[i % 16]
                           : format == kE2M1 ? static_cast<float>(kE2M1Twice[i % 16])
                                             : static_cast<float>(i % 16 - code_of_zero(format));
      float left = number;
      for (auto& part : parts) {
        uint32_t bits;
        std::memcpy(&bits, &left, 4);
        part[i] = static_cast<uint16_t>(bits >> 16);
        // Something is left for each part of three: 0 would make a NaN of inf.
        if (format == kNF4 && left != 0 && left == to_f32(part[i]) && &part != &parts[2]) --part[i];
        left -= to_f32(part[i]);
      }
    }
  }
};

template <Format kFormat>
const NibbleTable& nibble_table() {
  static const NibbleTable table(kFormat);
  return table;
}

// The same of 4 bits, by lookup; a part of all its numbers, `part_bytes`, then the next one.
template <int kParts>
inline __attribute__((always_inline)) void nibble_step(const uint8_t* codes, const NibbleTable& table, int64_t part_bytes,
                                                       uint8_t* out) {
  const __m512i first = _mm512_set1_epi32(0x01010000), second = _mm512_set1_epi32(0x03030202);
  const __m512i lanes = _mm512_broadcast_i32x4(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
  const __m512i loaded = _mm512_loadu_si512(codes);
  for (int half = 0; half < 2; ++half) {
    const __m512i nibbles = half == 0 ? loaded : _mm512_srli_epi16(loaded, 4);
    for (int pair = 0; pair < 2; ++pair) {
      const __m512i at = _mm512_shuffle_epi8(nibbles, _mm512_add_epi8(lanes, pair == 0 ? first : second));
      for (int p = 0; p < kParts; ++p) {
        const __m512i numbers = _mm512_permutexvar_epi16(at, _mm512_loadu_si512(table.parts[p]));
        _mm512_storeu_si512(out + p * part_bytes + (2 * half + pair) * kStepBytes, numbers);
      }
    }
  }
}

// A part of a block as tiles are loaded from it: chunk after chunk (of each the parts), those of a tile padded with
// zeros.
template <Format kFormat, bool kIntegers, int kParts>
void tile_panel(const Job& job, const Chunks& chunks, int64_t block, const Part& part, uint8_t* panel) {
  const int64_t chunk_steps = chunks.k / step_k(kFormat);
  const int64_t step_bytes = step_k(kFormat) * kColumns * (kIntegers ? 1 : 2), part_bytes = chunk_steps * step_bytes;
  for (int64_t t = part.tile; t < part.tile_end; ++t) {
    const int64_t steps = job.steps;
    const uint8_t* codes = job.codes + block * job.block_bytes() + (t * steps + part.step) * kStepBytes;
    Floats zeros = Simd::fset(0);
    if constexpr (is_integer(kFormat) && !kIntegers) {
      if (job.zeros != nullptr) zeros = signed_zeros(job, block, t);
    }
    for (int64_t s = part.step; s < part.step_end; s += chunk_steps, panel += kParts * part_bytes) {
      const int64_t count = std::min(chunk_steps, part.step_end - s);
      uint8_t* out = panel;
      for (int64_t i = 0; i < count; ++i, codes += kStepBytes, out += step_bytes) {
        if constexpr (kIntegers) {
          byte_step<kFormat>(codes, out);
        } else if (is_nibble(kFormat) && (kFormat != kInt4 || job.zeros == nullptr)) {
          nibble_step<kParts>(codes, nibble_table<kFormat>(), part_bytes, out);
        } else if constexpr (kFormat != kNF4) {
          bf16_step<kFormat>(codes, zeros, out);
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
constexpr int64_t kBlocksOfTilePass = 32;
constexpr int64_t kTileWaitingBytes = kBlocksOfTilePass * kRowsOfItem * static_cast<int64_t>(sizeof(Waiting));

void configure(const Chunks& chunks, int64_t rows) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(i < kB ? rows : chunks.bytes / 4);
    config.row_bytes[i] = static_cast<uint16_t>(i >= kA && i < kB ? chunks.bytes : kStepBytes);
  }
  Tiles::configure(config);
}

// Sum `kBlocks` group + block of the tile registers += the products of an A and a B of them.
template <Format kFormat, bool kIntegers, int kBlocks, int kGroup, int kBlock>
inline void add_tiles() {
  constexpr int sum = kBlocks * kGroup + kBlock, a = kA + kGroup, b = kB + kBlock;
  if constexpr (!kIntegers) {
    Tiles::add_bf16<sum, a, b>();
  } else if constexpr (kFormat == kInt8) {
    Tiles::add_uint8<sum, a, b>();
  } else {
    Tiles::add_int8<sum, a, b>();
  }
}

// Adds the products of a chunk of one group of rows, or of two `group_bytes` apart, and one block, or two
// `panel_bytes` apart.
template <Format kFormat, bool kIntegers, int kXParts, int kWParts, int kBlocks, int kGroups>
inline __attribute__((always_inline)) void add_chunk(const char* acts, int64_t act_bytes, int64_t row_bytes,
                                                     int64_t group_bytes, const uint8_t* panel, int64_t panel_bytes) {
  for (int w = 0; w < kWParts; ++w) {
    const uint8_t* part = panel + w * row_bytes * kColumns;
    Tiles::load<kB>(part, kStepBytes);
    if constexpr (kBlocks == 2) Tiles::load<kB + 1>(part + panel_bytes, kStepBytes);
    for (int x = 0; x + w < std::max(kXParts, kWParts) && x < kXParts; ++x) {
      const char* a = acts + x * act_bytes;
      Tiles::load<kA>(a, row_bytes);
      add_tiles<kFormat, kIntegers, kBlocks, 0, 0>();
      if constexpr (kBlocks == 2) add_tiles<kFormat, kIntegers, kBlocks, 0, 1>();
      if constexpr (kGroups == 2) {
        Tiles::load<kA + 1>(a + group_bytes, row_bytes);
        add_tiles<kFormat, kIntegers, kBlocks, 1, 0>();
        if constexpr (kBlocks == 2) add_tiles<kFormat, kIntegers, kBlocks, 1, 1>();
      }
    }
  }
}

// What of the weight is wanted next, of blocks beside each other: fetched a little with each chunk, so that memory
// has time.
struct Next {
  const uint8_t* data;
  int64_t lines, block_bytes, blocks;  // of 64 bytes, in a block
  int64_t each;                        // lines at once

  inline __attribute__((always_inline)) void fetch_some() {
    for (int64_t i = 0; i < each && lines > 0; ++i, --lines, data += 64) {
      for (int64_t b = 0; b < blocks; ++b) __builtin_prefetch(data + b * block_bytes, 0, 2);
    }
  }
};

// The result of a group of `rows` for a part of a block, or of two groups of 16 and two blocks: `codes_of_block` and
// `sums_of_block` apart are the second block's.
template <Format kFormat, bool kIntegers, int kXParts, int kWParts, int kBlocks, int kGroups>
void tile_rows(const Job& job, const Chunks& chunks, int64_t block, int64_t row, int64_t rows, const Part& part,
               const uint8_t* codes, int64_t codes_of_block, Next& next, Waiting* waiting,
               int64_t sums_of_block) {
  if (kGroups == 2) rows = kTileRows;
  alignas(64) int32_t sums[kGroups][kBlocks][kTileRows][kColumns];
  const int64_t act_bytes = rows * chunks.bytes, part_k = (part.step_end - part.step) * step_k(kFormat);
  const int64_t first = part.step * step_k(kFormat) / chunks.k, count = (part_k + chunks.k - 1) / chunks.k;
  // fn(sum of the tile registers, group, block) for each of them.
  auto each_sum = [&](auto fn) __attribute__((always_inline)) {
    fn(K<0>(), 0, 0);
    if constexpr (kBlocks == 2) fn(K<1>(), 0, 1);
    if constexpr (kGroups == 2) {
      fn(K<kBlocks>(), 1, 0);
      if constexpr (kBlocks == 2) fn(K<kBlocks + 1>(), 1, 1);
    }
  };
  auto waiting_of = [&](int group, int b) { return waiting + b * sums_of_block + group * kTileRows; };
  for (int64_t t = part.tile; t < part.tile_end; ++t) {
    const char* acts = job.rows + row * job.row_stride + (t * chunks.count + first) * kXParts * act_bytes;
    if (part.step == 0) {
      each_sum([&](auto sum, int, int) { Tiles::zero<decltype(sum)::value>(); });
    } else {
      each_sum([&](auto sum, int group, int b) {
        Tiles::load<decltype(sum)::value>(waiting_of(group, b)->ints, sizeof(Waiting));
      });
    }
    for (int64_t c = 0; c < count; ++c, acts += kXParts * act_bytes, codes += kWParts * chunks.bytes * kColumns) {
      next.fetch_some();
      add_chunk<kFormat, kIntegers, kXParts, kWParts, kBlocks, kGroups>(
          acts, act_bytes, chunks.bytes, kTileRows * job.row_stride, codes, codes_of_block);
    }
    if (!part.ends_tile) {
      each_sum([&](auto sum, int group, int b) {
        Tiles::store<decltype(sum)::value>(waiting_of(group, b)->ints, sizeof(Waiting));
      });
      return;  // such a part is of one tile
    }
    each_sum([&](auto sum, int group, int b) { Tiles::store<decltype(sum)::value>(sums[group][b], kStepBytes); });
    each_sum([&](auto, int group, int b) __attribute__((always_inline)) {
      Floats scale = load_scale(job, block + b, t);
      if constexpr (kFormat == kE2M1) scale = Simd::fmul(scale, Simd::fset(unit(kFormat)));
      Waiting* out = waiting_of(group, b);
      const int64_t at = (row + group * kTileRows) * job.tiles + t;
      const float* row_scale = job.row_scale + at;
      const int32_t* row_sum = job.row_sum + at;
      const Output output(job, block + b);
      // Sums wait for those of the next tile of k, and those of the last one are results.
      const bool is_first = t == 0, is_last = t + 1 == job.tiles;
      auto finish = [&](auto sum_of) __attribute__((always_inline)) {
        for (int64_t r = 0; r < rows; ++r) {
          Floats sum = Simd::fmul(Simd::fmul(sum_of(r), Simd::fset(row_scale[r * job.tiles])), scale);
          if (!is_first) sum = Simd::fadd(sum, Simd::fload(out[r].floats));
          if (is_last) {
            output.store(row + group * kTileRows + r, sum);
          } else {
            Simd::fstore(out[r].floats, sum);
          }
        }
      };
      auto finish_integers = [&](auto correction) __attribute__((always_inline)) {
        finish([&](int64_t r) {
          return Simd::to_float(Simd::isub(Simd::iload(sums[group][b][r]), correction(row_sum[r * job.tiles])));
        });
      };
      constexpr int32_t kZero = kFormat == kInt8 ? 0 : code_of_zero(kFormat);  // of the bytes as they are multiplied
      if constexpr (!kIntegers) {
        finish([&](int64_t r) { return Simd::fload(reinterpret_cast<const float*>(sums[group][b][r])); });
      } else if (kFormat != kE2M1 && job.zeros != nullptr) {
        const Ints zeros = Simd::isub(load_zeros(job, block + b, t), Simd::iset(kZero));
        finish_integers([&](int32_t sum) { return Simd::imul(zeros, Simd::iset(sum)); });
      } else if (kFormat == kInt8) {
        finish_integers([&](int32_t sum) { return Simd::iset(static_cast<int32_t>(static_cast<uint32_t>(sum) << 7)); });
      } else {
        finish([&](int64_t r) { return Simd::to_float(Simd::iload(sums[group][b][r])); });
      }
    });
  }
}

template <Format kFormat, bool kIntegers, int kXParts>
void tile_product(const Job& job, const Range& range, char* workspace) {
  constexpr int kWParts = kFormat == kNF4 ? 3 : 1;
  constexpr int64_t kPart = kIntegers ? 512 : kWParts == 1 ? 512 : 256;  // k
  static_assert(kPart * kColumns * (kIntegers ? 1 : 2 * kWParts) * 2 <= kTilePanelBytes);  // a tile is padded to less than twice
  const Chunks chunks(job);
  Waiting* waiting = reinterpret_cast<Waiting*>(workspace);
  uint8_t* decoded = reinterpret_cast<uint8_t*>(workspace + kTileWaitingBytes);
  const int64_t rows = range.end - range.begin, stride = job.block_bytes();
  int64_t configured = 0;
  // Codes of whole chunks of bytes are multiplied where they are.
  const bool direct = kIntegers && kFormat == kInt8 && job.padded_tile % chunks.k == 0;
  // A part of all rows of one block, or two.
  auto multiply = [&](const Part& part, auto blocks, int64_t block, Next next, Waiting* sums) {
    constexpr int kBlocks = decltype(blocks)::value;
    const uint8_t* codes = decoded;
    if (direct) {
      codes = job.codes + block * stride + (part.tile * job.steps + part.step) * kStepBytes;
    } else {
      for (int b = 0; b < kBlocks; ++b) {
        tile_panel<kFormat, kIntegers, kWParts>(job, chunks, block + b, part, decoded + b * kTilePanelBytes);
      }
    }
    const int64_t codes_of_block = direct ? stride : kTilePanelBytes;
    Tiles::fence();
    for (int64_t row = range.begin, size; row < range.end; row += size) {
      const bool both = kBlocks == 2 && range.end - row >= 2 * kTileRows;
      const int64_t group = std::min(kTileRows, range.end - row);
      size = both ? 2 * kTileRows : group;
      if (group != configured) configure(chunks, configured = group);
      // Of a part that is all there is nothing waits for long, so that the same few do.
      const bool whole = part.first && part.last;
      Waiting* of_group = whole ? sums : sums + (row - range.begin);
      if (both) {
        tile_rows<kFormat, kIntegers, kXParts, kWParts, kBlocks, kBlocks>(job, chunks, block, row, group, part, codes,
                                                                         codes_of_block, next, of_group, rows);
      } else {
        tile_rows<kFormat, kIntegers, kXParts, kWParts, kBlocks, 1>(job, chunks, block, row, group, part, codes,
                                                                   codes_of_block, next, of_group, rows);
      }
    }
  };
  const int64_t passes = (rows + 2 * kTileRows - 1) / (2 * kTileRows);  // over the codes of two blocks
  // One group of rows reads two blocks from end to end; more of them take a part of some blocks in turn, as activations
  // fill the cache.
  const int64_t blocks_of_pass = rows <= kTileRows ? 2 : kBlocksOfTilePass;
  for (int64_t start = range.block; start < range.block_end; start += blocks_of_pass) {
    const int64_t end = std::min(range.block_end, start + blocks_of_pass);
    each_part(job, kPart / step_k(kFormat), [&](const Part& part) {
      const int64_t first = (part.tile * job.steps + part.step) * kStepBytes, lines = part.steps();
      const int64_t iterations = passes * std::max<int64_t>(1, lines * step_k(kFormat) / chunks.k);
      for (int64_t block = start; block < end; block += 2) {
        // The same part of the next blocks; or the next part of the first ones; or the next blocks. Of one group of
        // rows what comes a little later.
        const int64_t next_block = block + 2 < end ? (block + 2) * stride : part.last ? end * stride - first
                                                                          : start * stride + lines * kStepBytes;
        const bool is_end = part.last && block + 2 >= range.block_end;
        const Next next = {job.codes + first + (rows <= kTileRows ? block * stride + kStreamAhead : next_block), lines, stride,
                           is_end ? 0 : 2, lines / iterations + 1};
        Waiting* sums = waiting + (block - start) * rows;
        if (block + 1 < end) {
          multiply(part, K<2>(), block, next, sums);
        } else {
          multiply(part, K<1>(), block, next, sums);
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

static_assert(kTileWaitingBytes + 2 * kTilePanelBytes <= kWorkspaceBytes);

}  // namespace
}  // namespace qwix
