#include "simd_avx512_vnni.h"
// The layer comes first.
#include "rows.h"
// Rows come before the rest.
#include "floats.h"
#include "registry.h"
#include "tiles.h"

namespace qwix {
const Kernels& amx_kernels() {
  static const Kernels& few = avx512_vnni_kernels();  // for few rows, and attention
  static const Kernels kernels = {"amx", most_rows_or_tiles, [](const Job&) { return kRowsOfItem; },
                                  row_bytes_or_tiles, prepare_or_tiles, multiply_or_tiles, few.attend, few.merge,
                                  few.attend_densely, few.lay_out_samples, few.moments};
  return kernels;
}
}  // namespace qwix
