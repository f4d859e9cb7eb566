// The kernels of each instruction set, and the choice among them.

#ifndef QWIX_CPU_REGISTRY_H_
#define QWIX_CPU_REGISTRY_H_

#include "job.h"

namespace qwix {

const Kernels& portable_kernels();
// build.py defines those that the compiler knows.
#if defined(QWIX_AVX2)
const Kernels& avx2_kernels();
#endif

// Those that this CPU runs, best first; the last are the portable ones, then null.
const Kernels* const* supported_kernels();

}  // namespace qwix

#endif  // QWIX_CPU_REGISTRY_H_
