// Compact max pooling and unpooling on the CPU: the schemas, and one task per row of the output.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/isa.h"
#include "max_unpool/max_unpool.h"

namespace fastseg {
namespace {

#define FASTSEG_KERNEL_FILE "max_unpool/max_unpool_kernel.inl"
#include "common/foreach_isa.inl"

constexpr int64_t kGrain = 1 << 15;  // elements per thread, below which a second one costs time

// Runs rows(begin, end) over all `count` rows of `width` elements.
template <typename Rows>
void for_rows(int64_t count, int64_t width, const Rows& rows) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)),
                              rows);
}

// Values of a split row (split_columns) with room for windows that hang over.
int64_t split_size(const Pool2d& p) {
  const WindowAxis& a = p.cols;
  return int64_t{std::max(a.count, a.size / a.stride) + 2 * a.kernel + 2} * a.stride;
}

// Unpooling that sums nothing and pooling by index only move bits: 16-bit types share their code.
template <typename T>
using Moved = std::conditional_t<sizeof(T) == 2, uint16_t, T>;

// x (N, C, H, W) -> maxima (N, C, h, w) and uint8 indices, (N, C, h, w) or packed (max_unpool.h).
std::tuple<Tensor, Tensor> max_pool2d_cpu(const Tensor& image, IntPair kernel, IntPair stride,
                                          IntPair padding, bool ceil_mode, bool packed) {
  const Pool2d p = pool_of_image("max_pool2d", image, kernel, stride, padding, ceil_mode, packed);
  const Tensor x = dense(image, p.layout);
  const int64_t h = p.rows.count, w = p.cols.count;
  Tensor y = empty_image(x, {p.N, p.C, h, w}, x.scalar_type(), p.layout);
  Tensor indices = empty_image(x, {p.N, p.index_channels(), h, w}, ScalarType::Byte, p.layout);
  uint8_t* codes = indices.mutable_data_ptr<uint8_t>();
  dispatch_floating(x, "max_pool2d", [&](auto tag) {
    using T = decltype(tag);
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    const int64_t count = p.N * h * (p.channels_last() ? 1 : p.index_channels());
    for_rows(count, p.N * p.C * h * w / std::max<int64_t>(1, count), [&](auto begin, auto end) {
      std::vector<uint8_t> scratch(p.packed ? 4 * std::max(p.index_channels(), w) : 0);
      std::vector<T> split(split_size(p));
      FASTSEG_ISA_CALL(pool_rows<T>)
      (p, from, to, codes, scratch.data(), split.data(), begin, end);
    });
  });
  return {y, indices};
}

// x (N, C, h, w) and indices -> (N, C, H, W): every value at the pixel its index names, 0
// elsewhere. Where windows name one pixel, the last in row-major order wins; with accumulate they
// add up.
Tensor max_unpool2d_cpu(const Tensor& pooled, const Tensor& pooled_indices, IntPair kernel,
                        IntPair stride, IntPair padding, IntPair output_size, bool accumulate) {
  const Pool2d p =
      pool_of_indices("max_unpool2d", pooled, pooled_indices, output_size, kernel, stride, padding);
  FASTSEG_CHECK(pooled.size(2) == p.rows.count && pooled.size(3) == p.cols.count,
                "max_unpool2d: x and indices must have one height and width, got ", pooled.size(2),
                "x", pooled.size(3), " and ", p.rows.count, "x", p.cols.count);
  const Tensor x = dense(pooled, p.layout), indices = dense(pooled_indices, p.layout);
  Tensor out = empty_image(x, {p.N, p.C, p.rows.size, p.cols.size}, x.scalar_type(), p.layout);
  const uint8_t* codes = indices.const_data_ptr<uint8_t>();
  const int64_t channels = p.channels_last() ? p.C : 1;
  const int64_t count = p.channels_last() ? p.N * p.rows.size : p.N * p.C * p.rows.size;

  const auto run = [&](auto tag, auto acc, auto kernel_of_isa) {
    using T = decltype(tag);
    using Acc = decltype(acc);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    // As unpool_band shares it out.
    const int64_t row_size = p.cols.size * channels;
    const int64_t held = std::min(p.rows.kernel + p.rows.stride, p.rows.size);
    const int64_t values = held * row_size + (p.channels_last() ? p.C : p.cols.count);
    for_rows(count, row_size, [&](auto begin, auto end) {
      std::vector<Acc> buffer(std::is_same_v<T, Acc> ? 0 : values);
      std::vector<uint8_t> scratch(p.packed ? 4 * p.index_channels() + p.cols.count : 0);
      kernel_of_isa(p, from, codes, to, buffer.data(), scratch.data(), begin, end);
    });
  };
  dispatch_floating(x, "max_unpool2d", [&](auto tag) {
    using T = decltype(tag);
    using M = Moved<T>;
    using Acc = typename Accumulate<T>::type;
    if (!accumulate || !p.overlap()) {
      run(M{}, M{}, FASTSEG_ISA_CALL(unpool_rows<false, M, M>));
    } else {
      run(T{}, Acc{}, FASTSEG_ISA_CALL(unpool_rows<true, T, Acc>));
    }
  });
  return out;
}

// x (N, C, H, W) and indices (N, C, h, w) -> (N, C, h, w): the pixel each index names. The adjoint
// of max_unpool2d: last_only stands for accumulate = false.
Tensor max_pool2d_by_index_cpu(const Tensor& image, const Tensor& image_indices, IntPair kernel,
                               IntPair stride, IntPair padding, bool last_only) {
  const Pool2d p =
      pool_of_indices("max_pool2d_by_index", image, image_indices, {}, kernel, stride, padding);
  const Tensor x = dense(image, p.layout), indices = dense(image_indices, p.layout);
  const int64_t h = p.rows.count, w = p.cols.count;
  Tensor y = empty_image(x, {p.N, p.C, h, w}, x.scalar_type(), p.layout);
  const uint8_t* codes = indices.const_data_ptr<uint8_t>();
  dispatch_floating(x, "max_pool2d_by_index", [&](auto tag) {
    using M = Moved<decltype(tag)>;
    const M* from = static_cast<const M*>(x.const_data_ptr());
    M* to = static_cast<M*>(y.mutable_data_ptr());
    const int64_t channels = p.channels_last() ? p.C : 1;
    for_rows(p.N * (p.channels_last() ? 1 : p.C) * h, w * channels, [&](auto begin, auto end) {
      std::vector<uint8_t> scratch(p.packed ? 4 * p.index_channels() + w : 0);
      std::vector<M> split(split_size(p));
      FASTSEG_ISA_CALL(by_index_rows<M>)
      (p, from, codes, to, last_only, scratch.data(), split.data(), begin, end);
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def(
      "max_pool2d(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, "
      "bool packed) -> (Tensor, Tensor)");
  m.def(
      "max_unpool2d(Tensor x, Tensor indices, int[2] kernel_size, int[2] stride, int[2] padding, "
      "SymInt[2] output_size, bool accumulate) -> Tensor");
  m.def(
      "max_pool2d_by_index(Tensor x, Tensor indices, int[2] kernel_size, int[2] stride, "
      "int[2] padding, bool last_only) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d_cpu));
  m.impl("max_unpool2d", TORCH_BOX(&max_unpool2d_cpu));
  m.impl("max_pool2d_by_index", TORCH_BOX(&max_pool2d_by_index_cpu));
}

}  // namespace fastseg
