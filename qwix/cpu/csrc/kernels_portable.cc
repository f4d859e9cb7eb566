#include "simd_portable.h"
// The layer comes first.
#include "kernels.h"
#include "registry.h"

namespace qwix {
const Kernels& portable_kernels() { return kKernels; }
}  // namespace qwix
