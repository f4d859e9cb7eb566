// The XLA custom call: buffers to a Job, scratch, threads.

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>

#include "job.h"
#include "registry.h"
#include "threads.h"

namespace qwix {
namespace {

// The i-th best kernels that this CPU runs, or null.
const Kernels* kernels_at(int64_t index) {
  const Kernels* const* list = supported_kernels();
  for (int64_t i = 0; i < index && *list != nullptr; ++i) ++list;
  return *list;
}

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

void run(Job& job, const Kernels& kernels, ffi::ThreadPool& pool, int64_t workers) {
  const int64_t most = kernels.most_rows(job);  // items have multiples of it
  if (needs_prepare(job)) {
    const int64_t rows = (std::max<int64_t>(1, 16384 / std::max<int64_t>(1, job.k)) + most - 1) / most * most;
    parallel_for(pool, workers, (job.m + rows - 1) / rows, [&](int64_t item) {
      kernels.prepare(job, item * rows, std::min(job.m, (item + 1) * rows));
    });
  }
  const int64_t all_blocks = job.leads * job.blocks;
  // Enough items that threads finish together, and not so many that taking one costs; 32 KiB of codes, or 4 million
  // products, take some microseconds.
  const int64_t most_of_item = kernels.rows_of_item(job) / most * most;
  const int64_t cost = std::max(job.block_bytes(), job.block_bytes() * std::min(job.m, most_of_item) / 8);
  int64_t blocks = std::clamp<int64_t>(32768 / std::max<int64_t>(1, cost), 1, all_blocks);
  int64_t rows = most_of_item;
  if (workers > 1) {
    const int64_t wanted = std::max<int64_t>(1, 8 * workers / ((job.m + rows - 1) / rows));
    blocks = std::clamp<int64_t>(all_blocks / wanted, blocks, std::max<int64_t>(blocks, 64));
    if (blocks > kBlocksOfPass) blocks -= blocks % kBlocksOfPass;
  }
  const int64_t columns = (all_blocks + blocks - 1) / blocks;
  if (columns < 2 * workers && job.m > 64 && job.m <= rows) rows = 64 / most * most;
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
                  int64_t format, int64_t mode, int64_t n, int64_t tile, float factor, int64_t activation,
                  int64_t kernels_index) {
  const Operand x(x_buffer, 2), x_scale(x_scale_buffer, 2), codes(codes_buffer, 3), scale(scale_buffer, 3),
      zeros(zeros_buffer, 3), bias(bias_buffer, 1), y(*y_buffer, 2);
  if (y.batch() == 0 || y.empty()) return ffi::Error::Success();

  Job job = {};
  if (format < kInt8 || format > kE5M2 || mode < 0 || mode > 2 || activation < 0 || activation > kGeluTanh) {
    return invalid("unknown format, mode or activation");
  }
  job.format = static_cast<Format>(format);
  job.mode = static_cast<Mode>(mode);
  job.factor = factor;
  job.activation = static_cast<Activation>(activation);
  job.m = x.dim(0);
  job.k = x.dim(1);
  job.n = n;
  job.blocks = (n + kColumns - 1) / kColumns;
  job.leads = codes.dim(0) / std::max<int64_t>(1, job.blocks);
  job.tiles = scale.dim(1);
  job.tile = tile;
  job.padded_tile = (tile + 7) / 8 * 8;
  job.steps = job.padded_tile / step_k(job.format);
  job.last_steps = (job.k_of_tile(job.tiles - 1) + step_k(job.format) - 1) / step_k(job.format);
  // What the Python side made sure of; read past the end of an array by no means.
  if (job.tile < 1 || job.k > job.tiles * job.tile || job.k <= (job.tiles - 1) * job.tile ||
      job.leads * job.blocks != codes.dim(0) ||
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

  const Kernels* const chosen = kernels_at(kernels_index);
  if (chosen == nullptr) return invalid("there are not so many kernels");
  const Kernels& kernels = *chosen;

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
  if (static_cast<int64_t>(scratch_buffer->size_bytes()) < row_data + 2 * tile_data) {
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

ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::AnyBuffer keys,
                     ffi::Buffer<ffi::F32> key_scale, ffi::AnyBuffer values, ffi::Buffer<ffi::F32> value_scale,
                     ffi::Buffer<ffi::S32> used, ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::F32> scratch,
                     float scale, int64_t kernels_index) {
  const auto invalid = [](const char* what) {
    return ffi::Error::InvalidArgument(std::string("qwix_cpu_attention: ") + what);
  };
  const auto q = query.dimensions(), k = keys.dimensions(), v = values.dimensions();
  if (q.size() != 3 || k.size() != 3 || v.size() != 3 || used.element_count() != 1) return invalid("shapes do not fit");
  Attention job = {};
  job.heads = q[0];
  job.queries = q[1];
  job.width = q[2];
  job.size = k[1];
  job.scale = scale;
  for (size_t i = 0; i < 3; ++i) {
    if (k[i] != v[i] || (i != 1 && k[i] != q[i])) return invalid("shapes do not fit");
  }
  const auto type = type_of(keys);
  const size_t scales = type == Type::kS8 ? static_cast<size_t>(job.heads * job.size) : 0;
  if (!type || keys.element_type() != values.element_type() || key_scale.element_count() != scales ||
      value_scale.element_count() != scales) {
    return invalid("unknown dtypes, or scales that do not fit");
  }
  if (y->element_count() != query.element_count() ||
      static_cast<int64_t>(scratch->element_count()) < job.heads * job.parts() * job.queries * job.part_stride()) {
    return invalid("too little memory for the results");
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  if (job.size == 0) return invalid("the cache holds nothing");
  job.type = *type;
  job.used = std::clamp<int64_t>(used.typed_data()[0], 1, job.size);
  job.query = query.typed_data();
  job.keys = keys.untyped_data();
  job.values = values.untyped_data();
  job.key_scale = scales ? key_scale.typed_data() : nullptr;
  job.value_scale = scales ? value_scale.typed_data() : nullptr;
  job.y = y->typed_data();
  job.scratch = scratch->typed_data();
  const Kernels* kernels = kernels_at(kernels_index);
  if (kernels == nullptr) return invalid("there are not so many kernels");

  // As for matmuls: a thread for 64 KiB.
  const int64_t bytes = static_cast<int64_t>(ffi::ByteWidth(keys.element_type())) * 2 * job.heads * job.used * job.width;
  const int64_t workers = std::clamp<int64_t>(bytes / 65536, 1, std::max<int64_t>(1, pool.num_threads()));
  const int64_t parts = job.used_parts();
  parallel_for(pool, workers, job.heads * parts, [&](int64_t i) { kernels->attend(job, i / parts, i % parts); });
  for (int64_t i = 0; i < job.heads * job.queries; ++i) kernels->merge(job, i / job.queries, i % job.queries);
  return ffi::Error::Success();
}

ffi::Error dense_attention(ffi::ThreadPool pool, ffi::AnyBuffer query_buffer, ffi::AnyBuffer key_buffer,
                           ffi::AnyBuffer value_buffer, ffi::AnyBuffer bias_buffer,
                           ffi::Result<ffi::AnyBuffer> y_buffer, float scale, int64_t kernels_index) {
  const auto invalid = [](const char* what) {
    return ffi::Error::InvalidArgument(std::string("qwix_cpu_dense_attention: ") + what);
  };
  const Operand query(query_buffer, 3), key(key_buffer, 3), value(value_buffer, 3), bias(bias_buffer, 3),
      y(*y_buffer, 3);
  for (const auto& buffer : {query_buffer, key_buffer, value_buffer, bias_buffer, ffi::AnyBuffer(*y_buffer)}) {
    if (buffer.element_type() != ffi::F32) return invalid("unknown dtypes");
  }
  if (y.batch() == 0 || y.empty()) return ffi::Error::Success();
  DenseAttention job = {};
  job.queries = query.dim(0);
  job.heads = query.dim(1);
  job.width = query.dim(2);
  job.keys = key.dim(0);
  job.key_heads = key.dim(1);
  job.scale = scale;
  for (size_t i = 0; i < 3; ++i) {
    if (key.dim(i) != value.dim(i) || query.dim(i) != y.dim(i)) return invalid("shapes do not fit");
  }
  if (key.dim(2) != job.width || job.width > kMostDenseWidth || job.keys == 0 || job.key_heads == 0 ||
      job.heads % job.key_heads != 0) {
    return invalid("shapes do not fit");
  }
  if (!bias.empty()) {
    const int64_t heads = bias.dim(0), queries = bias.dim(1);
    if (bias.dim(2) != job.keys || (heads != 1 && heads != job.heads) || (queries != 1 && queries != job.queries)) {
      return invalid("the bias does not fit");
    }
    job.bias_query = queries == 1 ? 0 : job.keys;
    job.bias_head = heads == 1 ? 0 : queries * job.keys;
  }
  const Kernels* kernels = kernels_at(kernels_index);
  if (kernels == nullptr) return invalid("there are not so many kernels");

  // As for matmuls: a thread for a million products. Items of fewer queries where there are few heads for the threads.
  const int64_t heads = y.batch() * job.heads;
  const double products = 2.0 * static_cast<double>(heads * job.queries) * static_cast<double>(job.keys * job.width);
  const int64_t workers =
      std::clamp<int64_t>(static_cast<int64_t>(products / 1e6), 1, std::max<int64_t>(1, pool.num_threads()));
  int64_t rows = kDenseQueries;
  while (rows > 16 && heads * ((job.queries + rows - 1) / rows) < 4 * workers) rows /= 2;
  const int64_t parts = (job.queries + rows - 1) / rows;
  parallel_for(pool, workers, heads * parts, [&](int64_t item) {
    const int64_t index = item / parts / job.heads, begin = item % parts * rows;
    DenseAttention one = job;
    one.query = reinterpret_cast<const float*>(query.at(index, y));
    one.key = reinterpret_cast<const float*>(key.at(index, y));
    one.value = reinterpret_cast<const float*>(value.at(index, y));
    one.bias = bias.empty() ? nullptr : reinterpret_cast<const float*>(bias.at(index, y));
    one.y = reinterpret_cast<float*>(const_cast<char*>(y.at(index, y)));
    kernels->attend_densely(one, item / parts % job.heads, begin, std::min(job.queries, begin + rows), workspace());
  });
  return ffi::Error::Success();
}

ffi::Error second_moments(ffi::ThreadPool pool, ffi::AnyBuffer x_buffer, ffi::Result<ffi::AnyBuffer> y_buffer,
                          ffi::ResultBuffer<ffi::F32> blocks, int64_t kernels_index) {
  const auto invalid = [](const char* what) {
    return ffi::Error::InvalidArgument(std::string("qwix_cpu_second_moments: ") + what);
  };
  if (x_buffer.element_type() != ffi::F32 || y_buffer->element_type() != ffi::F32) return invalid("unknown dtypes");
  const Operand x(x_buffer, 2), y(*y_buffer, 2);
  if (y.batch() == 0 || y.empty()) return ffi::Error::Success();
  Moments job = {};
  job.samples = x.dim(0);
  job.features = x.dim(1);
  if (y.dim(0) != job.features || y.dim(1) != job.features) return invalid("shapes do not fit");
  const Kernels* kernels = kernels_at(kernels_index);
  if (kernels == nullptr) return invalid("there are not so many kernels");

  const int64_t padded = (job.features + 15) / 16 * 16;
  if (static_cast<int64_t>(blocks->element_count()) < y.batch() * job.samples * padded) {
    return invalid("too little memory for the blocks");
  }

  // Small tiles waste less of the diagonal and go to more threads, large ones read less.
  job.tile = job.features >= 8 * kMomentsTile ? kMomentsTile : job.features >= 512 ? 64 : 32;
  const int64_t side = (job.features + job.tile - 1) / job.tile, tiles = side * (side + 1) / 2;
  const double products = 0.5 * static_cast<double>(y.batch() * job.samples) *
                          static_cast<double>(job.features * job.features);
  const int64_t workers =
      std::clamp<int64_t>(static_cast<int64_t>(products / 1e6), 1, std::max<int64_t>(1, pool.num_threads()));
  const auto at = [&](int64_t index) {
    Moments one = job;
    one.x = reinterpret_cast<const float*>(x.at(index, y));
    one.y = reinterpret_cast<float*>(const_cast<char*>(y.at(index, y)));
    one.blocks = blocks->typed_data() + index * job.samples * padded;
    return one;
  };
  constexpr int64_t kSamples = 32;  // each may be on a page of its own
  const int64_t parts = (job.samples + kSamples - 1) / kSamples;
  parallel_for(pool, workers, y.batch() * parts, [&](int64_t item) {
    const int64_t begin = item % parts * kSamples;
    kernels->lay_out_samples(at(item / parts), begin, std::min(job.samples, begin + kSamples));
  });
  parallel_for(pool, workers, y.batch() * tiles, [&](int64_t item) {
    int64_t column = item % tiles, row = 0;
    for (; column > row; ++row) column -= row + 1;
    kernels->moments(at(item / tiles), row * job.tile, column * job.tile, workspace());
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace qwix

XLA_FFI_DEFINE_HANDLER_SYMBOL(qwix_cpu_second_moments, qwix::second_moments,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("kernels"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qwix_cpu_dense_attention, qwix::dense_attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("kernels"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qwix_cpu_attention, qwix::attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("kernels"));

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
                                  .Attr<int64_t>("activation")
                                  .Attr<int64_t>("kernels"));

// The name of the i-th best kernels that this CPU runs, or null.
extern "C" const char* qwix_cpu_kernels(int index) {
  const qwix::Kernels* const kernels = qwix::kernels_at(index);
  return kernels == nullptr ? nullptr : kernels->name;
}
