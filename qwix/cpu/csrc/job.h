// What a kernel is asked to do, in terms that know nothing of XLA. The layout of the packed weight is
// described in ../packed.py.

#ifndef QWIX_CPU_JOB_H_
#define QWIX_CPU_JOB_H_

#include <cstdint>

namespace qwix {

inline constexpr int64_t kColumns = 16;    // of a block
inline constexpr int64_t kStepBytes = 64;  // 16 columns x 4 bytes: 4 k of 8 bits, 8 k of 4 bits

// The numbers are those of `FORMATS` in ../packed.py.
enum Format : int64_t { kInt8 = 0, kInt4 = 1, kE2M1 = 2, kNF4 = 3, kE4M3 = 4, kE5M2 = 5 };

constexpr bool is_nibble(Format f) { return f == kInt4 || f == kE2M1 || f == kNF4; }
constexpr bool is_integer(Format f) { return f == kInt8 || f == kInt4 || f == kE2M1; }
constexpr int64_t step_k(Format f) { return is_nibble(f) ? 8 : 4; }
// Codes of integer formats are unsigned; this one stands for 0 where there are no zero points.
constexpr int32_t code_of_zero(Format f) { return f == kInt8 ? 128 : f == kInt4 ? 8 : 12; }

enum class Type { kF32, kBF16, kF16, kS8 };

// What a sum goes through; the numbers are those of `ACTIVATIONS` in ../native.py.
enum Activation : int64_t { kNoActivation = 0, kRelu = 1, kSilu = 2, kGelu = 3, kGeluTanh = 4 };

enum class Mode : int64_t {
  kFloat = 0,      // x is float, and stays so
  kDynamic = 1,    // x is float, and quantized here: to int8, a scale for each row and tile
  kQuantized = 2,  // x is int8 with scales
};

// y[m, l, n] = activation(sum_k x[m, k] w[l, k, n] + bias[l, n]).
struct Job {
  int64_t m, k, n;
  int64_t leads;   // matrices side by side in the output
  int64_t blocks;  // of 16 columns, in each lead
  int64_t tile, padded_tile, tiles;  // k, of the rows of x, may end within the last tile
  int64_t steps, last_steps;         // of a padded tile; what the last tile has of them
  Format format;
  Mode mode;
  float factor;  // of the largest magnitude, which a dynamic scale maps to 127.5
  const void* x;
  Type x_type;
  const float* x_scale;  // (m, x_tiles), quantized mode
  int64_t x_tiles;       // 1 or tiles
  const uint8_t* codes;  // (leads * blocks, steps, 64)
  const void* scale;     // (leads * blocks, tiles, 16)
  Type scale_type;
  const uint8_t* zeros;  // as scale, or null
  const float* bias;     // (leads, n) or null
  Activation activation;
  void* y;               // (m, leads, n)
  Type y_type;
  // Scratch: what `prepare` writes and `multiply` reads. `rows` may be x itself, if it `needs_prepare` not.
  char* rows;
  int64_t row_stride;  // bytes
  float* row_scale;    // (m, tiles)
  int32_t* row_sum;    // (m, tiles): of codes, in integer modes

  bool integer() const { return mode != Mode::kFloat; }
  // How many k of a tile there are.
  int64_t k_of_tile(int64_t t) const { return t + 1 == tiles ? k - t * tile : tile; }
  int64_t padded_k() const { return tiles * padded_tile; }
  // Those to take of a tile: nothing comes after the k of the last one.
  int64_t steps_of_tile(int64_t t) const { return t + 1 < tiles ? steps : last_steps; }
  int64_t block_bytes() const { return tiles * steps * kStepBytes; }
};

inline constexpr int64_t kRowsOfItem = 128;             // in one call of `multiply`; of some products twice as many
inline constexpr int64_t kBlocksOfPass = 8;             // that many rows take in turn, see `each_pass` in rows.h
inline constexpr int64_t kWorkspaceBytes = 608 * 1024;  // that it is given

inline constexpr int64_t kKeysOfPart = 128;

// Queries of one token each against the cached keys and values of their head; see attention.h.
struct Attention {
  int64_t heads, queries, size, used, width;  // `queries` of each head; the first `used` of `size` tokens count
  float scale;
  Type type;  // of keys and values
  const float* query;            // (heads, queries, width)
  const void *keys, *values;     // (heads, size, width)
  const float *key_scale, *value_scale;  // (heads, size) for int8, else null
  float* y;                      // (heads, queries, width)
  float* scratch;                // (heads, parts of size, queries, part_stride)

  int64_t padded_width() const { return (width + 15) / 16 * 16; }
  int64_t part_stride() const { return padded_width() + 2; }
  int64_t parts() const { return (size + kKeysOfPart - 1) / kKeysOfPart; }
  int64_t used_parts() const { return (used + kKeysOfPart - 1) / kKeysOfPart; }
  float* part(int64_t head, int64_t part, int64_t query) const {
    return scratch + ((head * parts() + part) * queries + query) * part_stride();
  }
};

// Softmax attention of all queries to all keys, of one of a batch; see dense_attention.h.
struct DenseAttention {
  int64_t queries, keys, heads, key_heads, width;  // heads / key_heads of the queries share a head of the keys
  float scale;
  const float* query;         // (queries, heads, width)
  const float *key, *value;   // (keys, key_heads, width)
  const float* bias;          // added to scores, (heads, queries, keys) at these strides; or null
  int64_t bias_head, bias_query;
  float* y;  // (queries, heads, width)
};

inline constexpr int64_t kMostDenseWidth = 256;
inline constexpr int64_t kDenseQueries = 128;  // at most, in one call of `attend_densely`

// y = x^T x; see moments.h.
struct Moments {
  int64_t samples, features;
  int64_t tile;    // features of a side of a tile, a multiple of 16, at most kMomentsTile
  const float* x;  // (samples, features)
  float* y;        // (features, features)
  float* blocks;   // scratch: (blocks of 16 features, samples, 16)

  // Where a block of features has a sample.
  float* block(int64_t feature, int64_t sample) const { return blocks + (feature / 16 * samples + sample) * 16; }
};

inline constexpr int64_t kMomentsTile = 128;

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  // How many rows are multiplied at once: `begin` and `end` are multiples of it below, or the end that of the rows.
  int64_t (*most_rows)(const Job&);
  // How many rows one call of `multiply` takes at most.
  int64_t (*rows_of_item)(const Job&);
  // Bytes of a prepared row, a multiple of 4.
  int64_t (*row_bytes)(const Job&);
  // Rows [begin, end) of x into `rows`, `row_scale` and `row_sum`.
  void (*prepare)(const Job&, int64_t begin, int64_t end);
  // Columns of blocks [block, block_end), rows [begin, end) of the output.
  void (*multiply)(const Job&, int64_t block, int64_t block_end, int64_t begin, int64_t end, char* workspace);
  // One part of the keys of a head, and, after all of them, one query.
  void (*attend)(const Attention&, int64_t head, int64_t part);
  void (*merge)(const Attention&, int64_t head, int64_t query);
  // Queries [begin, end) of a head.
  void (*attend_densely)(const DenseAttention&, int64_t head, int64_t begin, int64_t end, char* workspace);
  // Samples [begin, end) into the blocks.
  void (*lay_out_samples)(const Moments&, int64_t begin, int64_t end);
  // The tile at (row, column <= row), multiples of its size, and the one that mirrors it.
  void (*moments)(const Moments&, int64_t row, int64_t column, char* workspace);
};

// Whether `prepare` has anything to do: a single row of floats lies as it is read.
inline bool needs_prepare(const Job& job) {
  return job.m > 1 || job.integer() || job.x_type != Type::kF32 || job.padded_k() != job.k;
}

}  // namespace qwix

#endif  // QWIX_CPU_JOB_H_
