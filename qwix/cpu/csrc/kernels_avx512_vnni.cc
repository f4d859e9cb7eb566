#include "simd_avx512_vnni.h"
// The layer comes first.
#include "kernels.h"
#include "registry.h"

namespace qwix {
const Kernels& avx512_vnni_kernels() { return kKernels; }
}  // namespace qwix
