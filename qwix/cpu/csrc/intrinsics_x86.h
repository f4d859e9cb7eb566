// The intrinsics of x86; or, in a build that is only for tests (`make kernels-emulated`), SIMDe's functions of their
// names, which any CPU runs.

#ifndef QWIX_CPU_INTRINSICS_X86_H_
#define QWIX_CPU_INTRINSICS_X86_H_

#if defined(QWIX_EMULATED)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
// The instruction of AVX-VNNI has the meaning of that of AVX-512 VNNI, but for the encoding.
#define _mm256_dpbusd_avx_epi32 _mm256_dpbusd_epi32

// What SIMDe 0.7.4 has not, from halves.
namespace qwix {
namespace {
__m512i emulated_join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
__m512i emulated_cvtepu8(__m128i x) {
  return emulated_join(_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)));
}
__m512i emulated_cvtepi8(__m128i x) {
  return emulated_join(_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)));
}
__m512i emulated_cvtepu16(__m256i x) {
  return emulated_join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
                       _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)));
}
__m512 emulated_cvtph(__m256i x) {
  return _mm512_castsi512_ps(emulated_join(_mm256_castps_si256(_mm256_cvtph_ps(_mm256_castsi256_si128(x))),
                                           _mm256_castps_si256(_mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)))));
}
__m256i emulated_half(__m512i x, bool upper) {
  return upper ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x);
}
__m512 emulated_cvtepi32_ps(__m512i x) {
  return _mm512_castsi512_ps(emulated_join(_mm256_castps_si256(_mm256_cvtepi32_ps(emulated_half(x, false))),
                                           _mm256_castps_si256(_mm256_cvtepi32_ps(emulated_half(x, true)))));
}
__m512i emulated_cvtps_epi32(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  return emulated_join(_mm256_cvtps_epi32(_mm256_castsi256_ps(emulated_half(bits, false))),
                       _mm256_cvtps_epi32(_mm256_castsi256_ps(emulated_half(bits, true))));
}
__m512i emulated_srai_epi32(__m512i x, int count) {
  return emulated_join(_mm256_sra_epi32(emulated_half(x, false), _mm_cvtsi32_si128(count)),
                       _mm256_sra_epi32(emulated_half(x, true), _mm_cvtsi32_si128(count)));
}
}  // namespace
}  // namespace qwix
#define __mmask16 simde__mmask16
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_srai_epi32 emulated_srai_epi32
#define _mm512_cvtepu8_epi32 emulated_cvtepu8
#define _mm512_cvtepi8_epi32 emulated_cvtepi8
#define _mm512_cvtepu16_epi32 emulated_cvtepu16
#define _mm512_cvtph_ps emulated_cvtph
#else
#include <immintrin.h>
#endif

#endif  // QWIX_CPU_INTRINSICS_X86_H_
