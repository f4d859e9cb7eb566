// The XLA custom call: buffers to a Job, scratch, threads.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "job.h"
#include "registry.h"
#include "xla/ffi/api/ffi.h"

#if defined(QWIX_X86)
#include <immintrin.h>
#endif

namespace qwix {

#if defined(QWIX_X86)
namespace {
// Whether the operating system saves the registers (bits of XCR0) that an instruction set uses.
bool saves(unsigned mask) {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & mask) == mask;
}
}  // namespace
#endif

const Kernels* const* supported_kernels() {
  static const Kernels* list[8] = {};
  static const bool filled = [] {
    const Kernels** next = list;
#if defined(QWIX_X86)
    __builtin_cpu_init();
#if defined(QWIX_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && saves(6)) *next++ = &avx2_kernels();
#endif
#endif
    *next++ = &portable_kernels();
    return true;
  }();
  static_cast<void>(filled);
  return list;
}

namespace {

namespace ffi = xla::ffi;

// Honours denormals, which XLA's threads flush to zero: fp8 codes are read through them.
class HonourDenormals {
 public:
#if defined(QWIX_X86)
  HonourDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~HonourDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// Runs fn(item) for all items, on this thread and those of XLA's pool that are free.
//
// This thread takes items as the others do, and then waits for none but those that were taken. So it does not
// depend on a free thread in the pool, of which it is most often itself one. A helper that comes late finds
// nothing to do, but has to find out, hence the shared state.
template <class Fn>
void parallel_for(ffi::ThreadPool& pool, int64_t workers, int64_t items, Fn fn) {
  if (workers <= 1 || items <= 1) {
    HonourDenormals scope;
    for (int64_t i = 0; i < items; ++i) fn(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto work = [items](State& shared, const Fn& body) {
    HonourDenormals scope;
    int64_t count = 0;
    for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < items; ++count) body(i);
    shared.done.fetch_add(count, std::memory_order_release);
  };
  for (int64_t i = 1; i < std::min(workers, items); ++i) {
    pool.Schedule([state, work, &fn, items] {
      // `fn` lives as long as items are left or unfinished.
      if (state->next.load(std::memory_order_relaxed) < items) work(*state, fn);
    });
  }
  work(*state, fn);
  for (int spins = 0; state->done.load(std::memory_order_acquire) < items; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

}  // namespace
}  // namespace qwix

namespace qwix {
namespace {

std::optional<Type> type_of(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::F32: return Type::kF32;
    case ffi::BF16: return Type::kBF16;
    case ffi::F16: return Type::kF16;
    case ffi::S8: return Type::kS8;
    default: return std::nullopt;
  }
}

// An operand whose last `core` axes are what one call works on, and the others are of a batch, of size 1 or that of
// the output.
struct Operand {
  const char* data;
  ffi::Span<const int64_t> dims;
  size_t core;
  int64_t item_bytes;

  Operand(const ffi::AnyBuffer& buffer, size_t core)
      : data(static_cast<const char*>(buffer.untyped_data())), dims(buffer.dimensions()), core(core) {
    item_bytes = static_cast<int64_t>(ffi::ByteWidth(buffer.element_type()));
    for (size_t i = batch_rank(); i < dims.size(); ++i) item_bytes *= dims[i];
  }
  size_t batch_rank() const { return dims.size() < core ? 0 : dims.size() - core; }
  bool empty() const { return item_bytes == 0; }
  int64_t dim(size_t i) const { return dims[batch_rank() + i]; }
  int64_t batch() const {
    int64_t size = 1;
    for (size_t i = 0; i < batch_rank(); ++i) size *= dims[i];
    return size;
  }
  // Where the data of an index into the output's batch axes is.
  const char* at(int64_t index, const Operand& out) const {
    int64_t offset = 0, stride = 1;
    for (size_t i = batch_rank(); i-- > 0;) {
      const int64_t position = index % out.dims[i];
      index /= out.dims[i];
      if (dims[i] != 1) {
        offset += position * stride;
        stride *= dims[i];
      }
    }
    return data + offset * item_bytes;
  }
};

// Memory of a thread, for what it works on.
constexpr int64_t kWorkspaceBytes = 64 * 1024;

char* workspace() {
  alignas(64) static thread_local char memory[kWorkspaceBytes];
  return memory;
}

void run(Job& job, const Kernels& kernels, ffi::ThreadPool& pool, int64_t workers) {
  if (needs_prepare(job)) {
    const int64_t rows = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, job.k));
    parallel_for(pool, workers, (job.m + rows - 1) / rows, [&](int64_t item) {
      kernels.prepare(job, item * rows, std::min(job.m, (item + 1) * rows));
    });
  }
  const int64_t all_blocks = job.leads * job.blocks;
  // Enough items that threads finish together, and not so many that taking one costs; 32 KiB of codes, or 4 million
  // products, take some microseconds.
  const int64_t cost = std::max(job.block_bytes(), job.block_bytes() * std::min(job.m, kRowsOfItem) / 8);
  int64_t blocks = std::clamp<int64_t>(32768 / std::max<int64_t>(1, cost), 1, all_blocks);
  if (workers > 1) blocks = std::clamp<int64_t>(all_blocks / (8 * workers), blocks, std::max<int64_t>(blocks, 64));
  const int64_t columns = (all_blocks + blocks - 1) / blocks;
  int64_t rows = std::min(job.m, kRowsOfItem);
  if (columns < 2 * workers && job.m > 64) rows = 64;
  const int64_t items = columns * ((job.m + rows - 1) / rows);
  parallel_for(pool, workers, items, [&](int64_t item) {
    const int64_t block = item % columns * blocks, row = item / columns * rows;
    kernels.multiply(job, block, std::min(all_blocks, block + blocks), row, std::min(job.m, row + rows),
                     workspace());
  });
}

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("qwix_cpu_matmul: " + what); }

ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer x_buffer,
                  ffi::AnyBuffer x_scale_buffer, ffi::AnyBuffer codes_buffer, ffi::AnyBuffer scale_buffer,
                  ffi::AnyBuffer zeros_buffer, ffi::AnyBuffer bias_buffer, ffi::Result<ffi::AnyBuffer> y_buffer,
                  ffi::Result<ffi::AnyBuffer> scratch_buffer,
                  int64_t format, int64_t mode, int64_t n, int64_t tile, float factor, int64_t kernels_index) {
  const Operand x(x_buffer, 2), x_scale(x_scale_buffer, 2), codes(codes_buffer, 3), scale(scale_buffer, 3),
      zeros(zeros_buffer, 3), bias(bias_buffer, 1), y(*y_buffer, 2);
  if (y.batch() == 0 || y.empty()) return ffi::Error::Success();

  Job job = {};
  if (format < kInt8 || format > kE5M2 || mode < 0 || mode > 2) return invalid("unknown format or mode");
  job.format = static_cast<Format>(format);
  job.mode = static_cast<Mode>(mode);
  job.factor = factor;
  job.m = x.dim(0);
  job.k = x.dim(1);
  job.n = n;
  job.blocks = (n + kColumns - 1) / kColumns;
  job.leads = codes.dim(0) / std::max<int64_t>(1, job.blocks);
  job.tiles = scale.dim(1);
  job.tile = tile;
  job.padded_tile = (tile + 7) / 8 * 8;
  // What the Python side made sure of; read past the end of an array by no means.
  if (job.tile < 1 || job.tiles * job.tile != job.k || job.leads * job.blocks != codes.dim(0) ||
      codes.dim(1) * codes.dim(2) != job.block_bytes() || scale.dim(0) != codes.dim(0) || scale.dim(2) != kColumns ||
      y.dim(0) != job.m || y.dim(1) != job.leads * n) {
    return invalid("shapes do not fit");
  }
  const bool quantized = job.mode == Mode::kQuantized;
  if (!is_integer(job.format) && job.integer()) return invalid("this format has no integer arithmetic");
  if (!zeros.empty() && zeros.item_bytes != job.leads * job.blocks * job.tiles * kColumns) {
    return invalid("zero points do not fit");
  }
  if (!bias.empty() && bias.dim(0) != job.leads * n) return invalid("bias does not fit");
  job.x_tiles = quantized ? x_scale.dim(1) : 1;
  if (quantized && (x_scale.dim(0) != job.m || (job.x_tiles != 1 && job.x_tiles != job.tiles))) {
    return invalid("scales of x do not fit");
  }
  const auto x_type = type_of(x_buffer), scale_type = type_of(scale_buffer), y_type = type_of(*y_buffer);
  if (!x_type || !scale_type || !y_type || *x_type == Type::kF16 || (*x_type == Type::kS8) != quantized ||
      *scale_type == Type::kS8 || (*y_type != Type::kF32 && *y_type != Type::kBF16) ||
      codes_buffer.element_type() != ffi::U8 || (!zeros.empty() && zeros_buffer.element_type() != ffi::U8) ||
      (!bias.empty() && bias_buffer.element_type() != ffi::F32) ||
      (quantized && x_scale_buffer.element_type() != ffi::F32)) {
    return invalid("unknown dtypes");
  }
  job.x_type = *x_type;
  job.scale_type = *scale_type;
  job.y_type = *y_type;

  const Kernels* const* list = supported_kernels();
  for (int64_t i = 0; i < kernels_index; ++i) {
    if (*++list == nullptr) return invalid("there are not so many kernels");
  }
  const Kernels& kernels = **list;

  // One weight for a batch of inputs: their rows, which are side by side in memory, are those of one input.
  int64_t batch = y.batch();
  const bool shared = codes.batch() == 1 && scale.batch() == 1 && zeros.batch() <= 1 && bias.batch() <= 1;
  const bool merged = shared && x.batch() == batch && (!quantized || x_scale.batch() == batch);
  if (merged) {
    job.m *= batch;
    batch = 1;
  }

  // A thread for 64 KiB of codes or a million products; waking one takes as long as these do.
  const double products = static_cast<double>(job.m) * static_cast<double>(job.k) * static_cast<double>(job.leads * n);
  const double bytes = static_cast<double>(job.block_bytes()) * static_cast<double>(codes.dim(0));
  const int64_t threads = pool.num_threads();
  const int64_t workers =
      std::clamp<int64_t>(static_cast<int64_t>(std::max(products / 1e6, bytes / 65536)), 1, std::max<int64_t>(1, threads));

  // Scratch is an output of its own: XLA's CPU backend (jaxlib 0.10) gives an FFI call no ScratchAllocator.
  const int64_t x_items = needs_prepare(job) ? job.m : 0;
  job.row_stride = kernels.row_bytes(job);
  char* rows = static_cast<char*>(scratch_buffer->untyped_data());
  const int64_t row_data = x_items * job.row_stride, tile_data = x_items * job.tiles * 4;
  if (static_cast<int64_t>(scratch_buffer->size_bytes()) < row_data + 2 * tile_data ||
      kernels.workspace_bytes(job) > kWorkspaceBytes) {
    return invalid("too little scratch memory");
  }
  job.row_scale = reinterpret_cast<float*>(rows + row_data);
  job.row_sum = reinterpret_cast<int32_t*>(rows + row_data + tile_data);
  for (int64_t i = 0; i < batch; ++i) {
    job.x = x.at(i, y);
    job.x_scale = reinterpret_cast<const float*>(x_scale.at(i, y));
    job.codes = reinterpret_cast<const uint8_t*>(codes.at(i, y));
    job.scale = scale.at(i, y);
    job.zeros = zeros.empty() ? nullptr : reinterpret_cast<const uint8_t*>(zeros.at(i, y));
    job.bias = bias.empty() ? nullptr : reinterpret_cast<const float*>(bias.at(i, y));
    job.y = const_cast<char*>(y.at(i, y));
    if (x_items > 0) {
      job.rows = rows;
    } else {
      job.rows = const_cast<char*>(static_cast<const char*>(job.x));
      job.row_stride = job.k * static_cast<int64_t>(sizeof(float));
    }
    run(job, kernels, pool, workers);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace qwix

XLA_FFI_DEFINE_HANDLER_SYMBOL(qwix_cpu_matmul, qwix::matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("format")
                                  .Attr<int64_t>("mode")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("tile")
                                  .Attr<float>("factor")
                                  .Attr<int64_t>("kernels"));

// The name of the i-th best kernels that this CPU runs, or null.
extern "C" const char* qwix_cpu_kernels(int index) {
  const qwix::Kernels* const* list = qwix::supported_kernels();
  for (int i = 0; i < index && *list != nullptr; ++i) ++list;
  return *list == nullptr ? nullptr : (*list)->name;
}
