// The kernels, written once on the vector layer `Simd` that the including file has chosen (simd_*.h).
//
// Everything is in an anonymous namespace: each file is compiled with flags of its own, and a function that the
// linker merged with that of another file would run instructions that the CPU may not have.

#include "rows.h"
// Rows come first.
#include "attention.h"
#include "floats.h"
#include "integers.h"

namespace qwix {
namespace {

template <Format kFormat>
void multiply_format(const Job& job, const Range& range, char* workspace) {
  if constexpr (is_integer(kFormat)) {
    if (job.integer()) return integer_product<kFormat>(job, range, workspace);
  }
  float_product<kFormat>(job, range, workspace);
}

void multiply(const Job& job, int64_t block, int64_t block_end, int64_t begin, int64_t end, char* workspace) {
  const Range range = {block, block_end, begin, end};
  switch (job.format) {
    case kInt8: return multiply_format<kInt8>(job, range, workspace);
    case kInt4: return multiply_format<kInt4>(job, range, workspace);
    case kE2M1: return multiply_format<kE2M1>(job, range, workspace);
    case kNF4: return multiply_format<kNF4>(job, range, workspace);
    case kE4M3: return multiply_format<kE4M3>(job, range, workspace);
    case kE5M2: return multiply_format<kE5M2>(job, range, workspace);
  }
}

// Sums that wait, and a panel: of bytes, or of floats. `each_part` gives at least one step.
static_assert(kWaitingBytes + std::max<int64_t>(kPartK, kPanelK * sizeof(float)) * kColumns <= kWorkspaceBytes);

constexpr Kernels kKernels = {Simd::kName, most_rows, row_bytes, prepare, multiply, attend, merge};

}  // namespace
}  // namespace qwix
