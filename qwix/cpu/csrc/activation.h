// Functions of single numbers, in float32. The compiler makes a loop over one of them a loop over vectors.

#ifndef QWIX_CPU_ACTIVATION_H_
#define QWIX_CPU_ACTIVATION_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "job.h"

namespace qwix {
namespace {

// exp(x) for x <= 0, to 2 units in the last place; 0 below -87.
inline float exp_of_negative(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kShifter = 12582912.0f;
  const float clamped = x < -87.0f ? -87.0f : x;  // NaN stays
  const float shifted = clamped * kLog2E + kShifter;
  const float n = shifted - kShifter;
  const float r = clamped - n * kLn2High - n * kLn2Low;
  float p = 1.9875691e-4f;  // the minimax polynomial of Cephes' expf on |r| <= ln(2) / 2
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 5.0000001e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits + 127u) << 23;  // what `shifted` has in its low bits is n
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.0f ? 0.0f : p * power;
}

// max(x, 0), of NaN NaN.
inline float relu(float x) { return x < 0.0f ? 0.0f : x; }

// x / (1 + exp(-y)).
inline float times_sigmoid(float x, float y) {
  const float e = exp_of_negative(-std::fabs(y));
  const float product = x * ((y < 0.0f ? e : 1.0f) / (1.0f + e));
  return y < -87.0f ? 0.0f : product;  // of x = -inf too
}

inline float silu(float x) { return times_sigmoid(x, x); }

// x Phi(x) = max(x, 0) - a Phi(-a), a = |x|, where Phi is the distribution of the standard normal (Hendrycks and Gimpel,
// arXiv 1606.08415). exp(a^2 / 2) Phi(-a) is a polynomial of 1 / (1 + 0.23 a), to 5e-8 of itself (least squares with
// weights that make the largest error smallest), so that small results are right as well.
inline float gelu(float x) {
  const float a = std::fabs(x) < 13.2f ? std::fabs(x) : 13.2f;
  const float t = 1.0f / (1.0f + 0.23f * a);
  float p = -0.07839691334325764f;
  p = p * t + 0.29005565121946075f;
  p = p * t - 0.27734804475560715f;
  p = p * t + 0.30052914797838903f;
  p = p * t - 0.0322242021205245f;
  p = p * t + 0.11919455718748875f;
  p = p * t + 0.08585192784663441f;
  p = p * t + 0.0923647158882991f;
  p = p * t - 2.686346354527358e-05f;
  return relu(x) - a * p * exp_of_negative(-0.5f * a * a);
}

// x / 2 (1 + tanh(y)) = x / (1 + exp(-2 y)), y = sqrt(2 / pi) (x + 0.044715 x^3).
inline float gelu_tanh(float x) { return times_sigmoid(x, 1.5957691216057308f * (x + 0.044715f * x * x * x)); }

template <float (*kFunction)(float)>
void apply(float* values) {
  for (int i = 0; i < kColumns; ++i) values[i] = kFunction(values[i]);
}

// Puts f(x) in the place of each of 16 numbers.
inline void activate(Activation activation, float* values) {
  switch (activation) {
    case kNoActivation: return;
    case kRelu: return apply<relu>(values);
    case kSilu: return apply<silu>(values);
    case kGelu: return apply<gelu>(values);
    case kGeluTanh: return apply<gelu_tanh>(values);
  }
}

}  // namespace
}  // namespace qwix

#endif  // QWIX_CPU_ACTIVATION_H_
