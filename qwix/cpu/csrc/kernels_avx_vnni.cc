#define QWIX_LAYER_AVX_VNNI
#include "simd_avx2.h"
// The layer comes first.
#include "kernels.h"
#include "registry.h"

namespace qwix {
const Kernels& avx_vnni_kernels() { return kKernels; }
}  // namespace qwix
