// Second moments X^T X of samples, which GPTQ, AWQ and SparseGPT minimize the error of a layer's output by.
//
// They are symmetric: square tiles on and below the diagonal are computed, in parts of the samples that stay in the
// caches, and copied to the other side. The samples are laid out for it once, as blocks of 16 features that are the
// rows of one tile and the columns of another.

#ifndef QWIX_CPU_MOMENTS_H_
#define QWIX_CPU_MOMENTS_H_

#include <algorithm>

#include "job.h"

namespace qwix {
namespace {

constexpr int64_t kSamplesOfPart = 256;

// Samples [begin, end), with zeros after the last feature.
void lay_out_samples(const Moments& job, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < job.features; i += 16) {
    const float* from = job.x + begin * job.features + i;
    float* to = job.block(i, begin);
    const int64_t count = std::min<int64_t>(16, job.features - i);
    for (int64_t s = begin; s < end; ++s, from += job.features, to += 16) {
      if (count == 16) {
        Simd::fstore(to, Simd::fload(from));
      } else {
        std::copy(from, from + count, to);
        std::fill(to + count, to + 16, 0.0f);
      }
    }
  }
}

// Adds the part of some samples to kRows rows of 16 columns.
template <int kRows>
void add_moments(const float* x, const float* columns, int64_t samples, float* to) {
  Floats sums[kRows];
  for (int r = 0; r < kRows; ++r) sums[r] = Simd::fload(to + r * kMomentsTile);
  add_products<kRows, 1, 16>(x, columns, samples, sums);
  for (int r = 0; r < kRows; ++r) Simd::fstore(to + r * kMomentsTile, sums[r]);
}

void moments(const Moments& job, int64_t row, int64_t column, char* workspace) {
  // Apart from y, whose rows may lie at a distance of a power of two, and share a few sets of the caches.
  float* const tile = reinterpret_cast<float*>(workspace);
  const int64_t rows = std::min(job.tile, job.features - row), columns = std::min(job.tile, job.features - column);
  std::fill(tile, tile + rows * kMomentsTile, 0.0f);
  for (int64_t begin = 0; begin < job.samples; begin += kSamplesOfPart) {
    const int64_t samples = std::min(kSamplesOfPart, job.samples - begin);
    for (int64_t j = 0; j < columns; j += 16) {
      for (int64_t i = 0, size; i < rows; i += size) {
        size = group_size(Simd::kPanelRows, std::min(16 - i % 16, rows - i));
        with_size<Simd::kPanelRows>(size, [&](auto group) {
          add_moments<decltype(group)::value>(job.block(row + i, begin) + i % 16, job.block(column + j, begin), samples,
                                              tile + i * kMomentsTile + j);
        });
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    std::copy(tile + i * kMomentsTile, tile + i * kMomentsTile + columns, job.y + (row + i) * job.features + column);
  }
  if (column == row) return;
  for (int64_t i = 0; i < rows; i += 16) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t end = std::min(i + 16, rows);
      for (int64_t r = i; r < end; ++r) job.y[(column + j) * job.features + row + r] = tile[r * kMomentsTile + j];
    }
  }
}

}  // namespace
}  // namespace qwix

#endif  // QWIX_CPU_MOMENTS_H_
