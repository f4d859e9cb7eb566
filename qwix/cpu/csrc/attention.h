// Attention of one new token to those in a cache: a pass over keys and values, each read once.
//
// The keys of a head fall into parts of kKeysOfPart. For each part and query, with s = scale q . k over its keys,
//
//     m = max s,    l = sum exp(s - m),    o = sum exp(s - m) v
//
// and `merge` puts the parts together (Dao et al., arXiv 2205.14135, section 3.1; its split over keys is
// Flash-Decoding): softmax(s) v = sum_parts exp(m - M) o / sum_parts exp(m - M) l, M the largest m.

#ifndef QWIX_CPU_ATTENTION_H_
#define QWIX_CPU_ATTENTION_H_

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>

#include "activation.h"
#include "job.h"

namespace qwix {
namespace {

// Columns [at, at + 16) of a row; kWhole says that it has as many, else `count` of them are there and 0 follows.
template <Type kType, bool kWhole>
Simd::Floats load_cached(const void* p, int64_t at, int64_t count) {
  constexpr int64_t kBytes = kType == Type::kF32 ? 4 : kType == Type::kS8 ? 1 : 2;
  const char* from = static_cast<const char*>(p) + at * kBytes;
  alignas(64) char filled[16 * kBytes];
  if (!kWhole && count < 16) {
    std::memset(filled, 0, sizeof filled);
    std::memcpy(filled, from, static_cast<size_t>(count * kBytes));
    from = filled;
  }
  if constexpr (kType == Type::kF32) return Simd::fload(reinterpret_cast<const float*>(from));
  if constexpr (kType == Type::kBF16) return Simd::fload_bf16(reinterpret_cast<const uint16_t*>(from));
  if constexpr (kType == Type::kF16) return Simd::fload_f16(reinterpret_cast<const uint16_t*>(from));
  if constexpr (kType == Type::kS8) return Simd::to_float(Simd::iload_s8(reinterpret_cast<const int8_t*>(from)));
}

// Turns scores into exp(s - m), and returns {m, their sum}. `count` is a multiple of 16; -inf stands for no score.
inline std::pair<float, float> exponentials(float* scores, int64_t count) {
  float lanes[16];
  std::copy(scores, scores + 16, lanes);
  for (int64_t t = 16; t < count; t += 16) {
    for (int i = 0; i < 16; ++i) lanes[i] = scores[t + i] > lanes[i] ? scores[t + i] : lanes[i];
  }
  const float largest = *std::max_element(lanes, lanes + 16);
  std::fill(lanes, lanes + 16, 0.0f);
  for (int64_t t = 0; t < count; t += 16) {
    for (int i = 0; i < 16; ++i) {
      scores[t + i] = exp_of_negative(scores[t + i] - largest);
      lanes[i] += scores[t + i];
    }
  }
  float total = 0;
  for (float lane : lanes) total += lane;
  return {largest, total};
}

// Queries [query, query + kCount) of a head, keys [begin, end).
template <Type kType, int kCount, bool kWhole>
void attend_some(const Attention& job, int64_t head, int64_t query, int64_t begin, int64_t end, float* out) {
  const int64_t width = job.width, count = end - begin, filled = (count + 15) / 16 * 16;
  const int64_t first = (head * job.size + begin) * width;
  const float* q = job.query + (head * job.queries + query) * width;
  alignas(64) float weights[kCount][kKeysOfPart];
  for (int64_t t = 0; t < count; ++t) {
    Simd::Floats sums[kCount];
    for (auto& sum : sums) sum = Simd::fset(0);
    for (int64_t i = 0; i < width; i += 16) {
      const int64_t some = std::min<int64_t>(16, width - i);
      const Simd::Floats k = load_cached<kType, kWhole>(job.keys, first + t * width + i, some);
      for (int j = 0; j < kCount; ++j) {
        sums[j] = Simd::fma(load_cached<Type::kF32, kWhole>(q, j * width + i, some), k, sums[j]);
      }
    }
    const float scale = job.key_scale == nullptr ? job.scale : job.scale * job.key_scale[head * job.size + begin + t];
    for (int j = 0; j < kCount; ++j) weights[j][t] = scale * Simd::fsum(sums[j]);
  }
  for (int j = 0; j < kCount; ++j) {
    float* result = out + j * job.part_stride();
    std::fill(weights[j] + count, weights[j] + filled, -std::numeric_limits<float>::infinity());
    std::tie(result[0], result[1]) = exponentials(weights[j], filled);
    if (job.value_scale != nullptr) {
      const float* scales = job.value_scale + head * job.size + begin;
      for (int64_t t = 0; t < count; ++t) weights[j][t] *= scales[t];
    }
  }
  for (int64_t i = 0; i < width; i += 16) {
    const int64_t some = std::min<int64_t>(16, width - i);
    Simd::Floats sums[kCount];
    for (auto& sum : sums) sum = Simd::fset(0);
    for (int64_t t = 0; t < count; ++t) {
      const Simd::Floats v = load_cached<kType, kWhole>(job.values, first + t * width + i, some);
      for (int j = 0; j < kCount; ++j) sums[j] = Simd::fma(Simd::fset(weights[j][t]), v, sums[j]);
    }
    for (int j = 0; j < kCount; ++j) Simd::fstore(out + j * job.part_stride() + 2 + i, sums[j]);
  }
}

template <Type kType, bool kWhole>
void attend_typed(const Attention& job, int64_t head, int64_t part) {
  const int64_t begin = part * kKeysOfPart, end = std::min(job.used, begin + kKeysOfPart);
  for (int64_t query = 0; query < job.queries;) {
    float* out = job.part(head, part, query);
    const int64_t count = std::min<int64_t>(job.queries - query, 4);
    switch (count) {
      case 1: attend_some<kType, 1, kWhole>(job, head, query, begin, end, out); break;
      case 2: attend_some<kType, 2, kWhole>(job, head, query, begin, end, out); break;
      case 3: attend_some<kType, 3, kWhole>(job, head, query, begin, end, out); break;
      default: attend_some<kType, 4, kWhole>(job, head, query, begin, end, out); break;
    }
    query += count;
  }
}

template <bool kWhole>
void attend_any(const Attention& job, int64_t head, int64_t part) {
  switch (job.type) {
    case Type::kF32: return attend_typed<Type::kF32, kWhole>(job, head, part);
    case Type::kBF16: return attend_typed<Type::kBF16, kWhole>(job, head, part);
    case Type::kF16: return attend_typed<Type::kF16, kWhole>(job, head, part);
    case Type::kS8: return attend_typed<Type::kS8, kWhole>(job, head, part);
  }
}

void attend(const Attention& job, int64_t head, int64_t part) {
  if (job.width % 16 == 0) return attend_any<true>(job, head, part);
  attend_any<false>(job, head, part);
}

// The output of a query from its parts.
void merge(const Attention& job, int64_t head, int64_t query) {
  float* y = job.y + (head * job.queries + query) * job.width;
  const int64_t parts = job.used_parts();
  float largest = job.part(head, 0, query)[0], total = 0;
  for (int64_t p = 1; p < parts; ++p) largest = std::max(largest, job.part(head, p, query)[0]);
  std::fill(y, y + job.width, 0.0f);
  for (int64_t p = 0; p < parts; ++p) {
    const float* part = job.part(head, p, query);
    const float weight = exp_of_negative(part[0] - largest);
    total += weight * part[1];
    for (int64_t i = 0; i < job.width; ++i) y[i] += weight * part[2 + i];
  }
  for (int64_t i = 0; i < job.width; ++i) y[i] /= total;
}

}  // namespace
}  // namespace qwix

#endif  // QWIX_CPU_ATTENTION_H_
