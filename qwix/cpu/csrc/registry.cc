// Which instruction sets the CPU has, and the operating system saves the registers of.

#include "registry.h"

#if defined(QWIX_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(QWIX_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace qwix {
namespace {

#if defined(QWIX_EMULATED)

// Kernels on emulated instructions run anywhere.
[[maybe_unused]] bool has_amx() { return true; }
[[maybe_unused]] bool has_avx512_vnni() { return true; }
[[maybe_unused]] bool has_avx_vnni() { return true; }
[[maybe_unused]] bool has_avx2() { return true; }
[[maybe_unused]] bool has_neon_dotprod() { return true; }

#elif defined(QWIX_X86)

// Bits of XCR0: the registers that the system saves.
constexpr unsigned kYmm = 0x06, kZmm = 0xe6, kTiles = 0x60000;

bool saves(unsigned mask) {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & mask) == mask;
}

[[maybe_unused]] bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && saves(kYmm);
}

[[maybe_unused]] bool has_avx_vnni() {
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

[[maybe_unused]] bool has_avx512_vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && saves(kZmm);
}

// Linux gives a process tile registers when it asks for them.
[[maybe_unused]] bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kBF16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBF16 | kTile | kInt8;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return has_avx512_vnni() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll && saves(kTiles) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#elif defined(QWIX_ARM)

[[maybe_unused]] bool has_neon_dotprod() {
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProduct) != 0;
#else
  return true;  // Apple's CPUs have it since the M1
#endif
}

#endif

}  // namespace

const Kernels* const* supported_kernels() {
  static const Kernels* list[8] = {};
  static const bool filled = [] {
    const Kernels** next = list;
#if defined(QWIX_AMX)
    if (has_amx()) *next++ = &amx_kernels();
#endif
#if defined(QWIX_AVX512_VNNI)
    if (has_avx512_vnni()) *next++ = &avx512_vnni_kernels();
#endif
#if defined(QWIX_AVX_VNNI)
    if (has_avx_vnni()) *next++ = &avx_vnni_kernels();
#endif
#if defined(QWIX_AVX2)
    if (has_avx2()) *next++ = &avx2_kernels();
#endif
#if defined(QWIX_NEON_DOTPROD)
    if (has_neon_dotprod()) *next++ = &neon_dotprod_kernels();
#endif
    *next++ = &portable_kernels();
    return true;
  }();
  static_cast<void>(filled);
  return list;
}

}  // namespace qwix
