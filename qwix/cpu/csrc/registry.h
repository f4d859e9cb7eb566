// The kernels of each instruction set, and the choice among them.

#ifndef QWIX_CPU_REGISTRY_H_
#define QWIX_CPU_REGISTRY_H_

#include "job.h"

namespace qwix {

// build.py defines the names of those that are compiled.
const Kernels& amx_kernels();
const Kernels& avx512_vnni_kernels();
const Kernels& avx_vnni_kernels();
const Kernels& avx2_kernels();
const Kernels& neon_dotprod_kernels();
const Kernels& portable_kernels();

// Those that this CPU runs, best first; the last are the portable ones, then null.
const Kernels* const* supported_kernels();

}  // namespace qwix

#endif  // QWIX_CPU_REGISTRY_H_
