// The kernels, written once on the vector layer `Simd` that the including file has chosen (simd_*.h).
//
// Everything is in an anonymous namespace: each file is compiled with flags of its own, and a function that the
// linker merged with that of another file would run instructions that the CPU may not have.

#include "rows.h"
// Rows come first.
#include "attention.h"
#include "dense_attention.h"
#include "floats.h"
#include "integers.h"
#include "moments.h"

namespace qwix {
namespace {

// Each item of floats dequantizes its weights, so that more rows share that.
int64_t rows_of_item(const Job& job) { return job.integer() ? kRowsOfItem : 2 * kRowsOfItem; }

int64_t row_bytes(const Job& job) {
  if (job.integer() && is_full(job.format) && FullDot::kSaturates) return Limited<FullDot>::row_bytes(job.padded_k());
  return job.padded_k() * (job.integer() ? 1 : static_cast<int64_t>(sizeof(float)));
}

void prepare(const Job& job, int64_t begin, int64_t end) {
  each_group(job, begin, end, [&](int64_t first, int64_t rows) {
    if (!job.integer()) {
      prepare_floats(job, first, rows, reinterpret_cast<float*>(job.rows + first * job.row_stride));
    } else if (is_full(job.format)) {
      prepare_group<FullDot>(job, first, rows);
    } else {
      prepare_group<Simd::Dot<false>>(job, first, rows);
    }
  });
}

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
static_assert(kMomentsTile * kMomentsTile * sizeof(float) <= kWorkspaceBytes);
static_assert(kDenseBytes <= kWorkspaceBytes);
static_assert(kWaitingBytes + std::max<int64_t>(kPanelPartK, kPanelK * sizeof(float)) * kColumns <= kWorkspaceBytes);

constexpr Kernels kKernels = {Simd::kName, most_rows, rows_of_item, row_bytes, prepare, multiply, attend, merge,
                              attend_densely, lay_out_samples, moments};

}  // namespace
}  // namespace qwix
