#include "simd_neon_dotprod.h"
// The layer comes first.
#include "kernels.h"
#include "registry.h"

namespace qwix {
const Kernels& neon_dotprod_kernels() { return kKernels; }
}  // namespace qwix
