// Attention of many queries, as an encoder has it: softmax(scale q . k + bias) v of each query of a head.
//
// The keys fall into parts of kKeysOfPart, which are laid out for the kernels once for all queries of a call. A group of
// queries goes through the parts with what it has of a softmax so far (Milakov and Gimelshein, arXiv 1805.02867;
// FlashAttention, arXiv 2205.14135, algorithm 1): the largest score m, l = sum exp(s - m), and o = sum exp(s - m) v, of
// which l and o are multiplied by exp(m - m') when the largest score becomes m'.

#ifndef QWIX_CPU_DENSE_ATTENTION_H_
#define QWIX_CPU_DENSE_ATTENTION_H_

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "activation.h"
#include "job.h"

namespace qwix {
namespace {

// What the queries of a call have of their softmax.
struct Softmax {
  float largest[kDenseQueries], total[kDenseQueries];
  float mixed[kDenseQueries][kMostDenseWidth];
};

struct DenseWorkspace {
  alignas(64) float keys[kKeysOfPart * kMostDenseWidth];    // (columns of 16 keys, width, 16)
  alignas(64) float values[kKeysOfPart * kMostDenseWidth];  // (columns of 16, keys, 16)
  alignas(64) float queries[Simd::kPanelRows][kMostDenseWidth];
  alignas(64) float scores[Simd::kPanelRows][kKeysOfPart];
  Softmax softmax;
};

constexpr int64_t kDenseBytes = sizeof(DenseWorkspace) + 64;

// A part of a head: keys [begin, begin + count), with zeros up to a multiple of 16 of them.
void lay_out(const DenseAttention& job, int64_t key_head, int64_t begin, int64_t count, DenseWorkspace& work) {
  const int64_t filled = (count + 15) / 16 * 16, stride = job.key_heads * job.width;
  const int64_t columns = (job.width + 15) / 16 * 16;
  const float* key = job.key + begin * stride + key_head * job.width;
  const float* value = job.value + begin * stride + key_head * job.width;
  for (int64_t t = 0; t < filled; t += 16) {
    float* to = work.keys + t * job.width;
    const int64_t some = std::min<int64_t>(16, count - t);
    if (some < 16) std::fill(to, to + 16 * job.width, 0.0f);
    for (int64_t i = 0; i < some; ++i) {
      for (int64_t d = 0; d < job.width; ++d) to[16 * d + i] = key[(t + i) * stride + d];
    }
  }
  for (int64_t d = 0; d < columns; d += 16) {
    float* to = work.values + d * filled;
    const int64_t some = std::min<int64_t>(16, job.width - d);
    if (some < 16 || count < filled) std::fill(to, to + 16 * filled, 0.0f);
    for (int64_t t = 0; t < count; ++t) {
      if (some == 16) {
        Simd::fstore(to + 16 * t, Simd::fload(value + t * stride + d));
      } else {
        std::copy(value + t * stride + d, value + t * stride + d + some, to + 16 * t);
      }
    }
  }
}

// fn(fn(x[0], x[8]), ...): of 16 numbers, by halves.
template <class Fn>
inline float reduce(const Floats& x, Fn fn) {
  float lanes[16];
  Simd::fstore(lanes, x);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = fn(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

// Turns `count` scores, a multiple of 16, into exp(s - m), m the largest of them and of `before`: {m, their sum}.
inline std::pair<float, float> exponentials(float* scores, int64_t count, float before) {
  Floats most = Simd::fset(before);
  for (int64_t t = 0; t < count; t += 16) most = Simd::fmax(Simd::fload(scores + t), most);
  const float largest = reduce(most, [](float x, float y) { return x > y ? x : y; });
  // Where all scores are -inf, their exponentials are 0.
  const float shift = largest == -std::numeric_limits<float>::infinity() ? 0.0f : largest;
  Floats total = Simd::fset(0);
  for (int64_t t = 0; t < count; t += 16) {
    for (int i = 0; i < 16; ++i) scores[t + i] = exp_of_negative(scores[t + i] - shift);
    total = Simd::fadd(total, Simd::fload(scores + t));
  }
  return {largest, Simd::fsum(total)};
}

// Queries [query, query + kRows), of which `softmax` has rows from `row`, and the part that is laid out.
template <int kRows>
void attend_group(const DenseAttention& job, int64_t head, int64_t query, int64_t row, int64_t begin, int64_t count,
                  DenseWorkspace& work) {
  const int64_t filled = (count + 15) / 16 * 16;
  for (int r = 0; r < kRows; ++r) {
    const float* from = job.query + ((query + r) * job.heads + head) * job.width;
    for (int64_t d = 0; d < job.width; ++d) work.queries[r][d] = job.scale * from[d];
  }
  for (int64_t t = 0; t < filled; t += 16) {
    Floats sums[kRows];
    for (Floats& sum : sums) sum = Simd::fset(0);
    add_products<kRows, kMostDenseWidth, 1>(work.queries[0], work.keys + t * job.width, job.width, sums);
    for (int r = 0; r < kRows; ++r) Simd::fstore(work.scores[r] + t, sums[r]);
  }
  Softmax& softmax = work.softmax;
  float kept[kRows];
  for (int r = 0; r < kRows; ++r) {
    float* scores = work.scores[r];
    if (job.bias != nullptr) {
      const float* bias = job.bias + head * job.bias_head + (query + r) * job.bias_query + begin;
      for (int64_t t = 0; t < count; ++t) scores[t] += bias[t];
    }
    std::fill(scores + count, scores + filled, -std::numeric_limits<float>::infinity());
    const float before = softmax.largest[row + r];
    const auto [largest, total] = exponentials(scores, filled, before);
    kept[r] = before == largest ? 1.0f : exp_of_negative(before - largest);
    softmax.largest[row + r] = largest;
    softmax.total[row + r] = kept[r] * softmax.total[row + r] + total;
  }
  for (int64_t d = 0; d < job.width; d += 16) {
    Floats sums[kRows];
    for (int r = 0; r < kRows; ++r) {
      sums[r] = Simd::fmul(Simd::fload(softmax.mixed[row + r] + d), Simd::fset(kept[r]));
    }
    add_products<kRows, kKeysOfPart, 1>(work.scores[0], work.values + d * filled, filled, sums);
    for (int r = 0; r < kRows; ++r) Simd::fstore(softmax.mixed[row + r] + d, sums[r]);
  }
}

void attend_densely(const DenseAttention& job, int64_t head, int64_t begin, int64_t end, char* workspace) {
  const uintptr_t address = (reinterpret_cast<uintptr_t>(workspace) + 63) / 64 * 64;
  DenseWorkspace& work = *reinterpret_cast<DenseWorkspace*>(address);
  Softmax& softmax = work.softmax;
  const int64_t rows = end - begin, key_head = head / (job.heads / job.key_heads);
  std::fill(softmax.largest, softmax.largest + rows, -std::numeric_limits<float>::infinity());
  std::fill(softmax.total, softmax.total + rows, 0.0f);
  for (int64_t r = 0; r < rows; ++r) std::fill(softmax.mixed[r], softmax.mixed[r] + (job.width + 15) / 16 * 16, 0.0f);
  for (int64_t key = 0; key < job.keys; key += kKeysOfPart) {
    const int64_t count = std::min(kKeysOfPart, job.keys - key);
    lay_out(job, key_head, key, count, work);
    for (int64_t row = 0, size; row < rows; row += size) {
      size = group_size(Simd::kPanelRows, rows - row);
      with_size<Simd::kPanelRows>(size, [&](auto group) {
        attend_group<decltype(group)::value>(job, head, begin + row, row, key, count, work);
      });
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* y = job.y + ((begin + r) * job.heads + head) * job.width;
    for (int64_t d = 0; d < job.width; ++d) y[d] = softmax.mixed[r][d] / softmax.total[r];
  }
}

}  // namespace
}  // namespace qwix

#endif  // QWIX_CPU_DENSE_ATTENTION_H_
