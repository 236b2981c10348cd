// Output tensors in memory that stays warm between calls.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <vector>

#include "common/dispatch.h"
#include "common/layout.h"
#include "common/workspace.h"

namespace fastseg {

// An uninitialised CPU tensor of the given dtype and (dense) strides. Large ones live in the
// workspace pool and go back there when they are freed: a fresh 16 MB tensor costs 4000 page
// faults, some 3 ms.
inline Tensor pooled_empty(const Tensor& x, const std::vector<int64_t>& sizes,
                           const std::vector<int64_t>& strides, ScalarType dtype,
                           int64_t element_bytes) {
  int64_t bytes = element_bytes;
  for (const int64_t size : sizes) bytes *= size;
  // A tensor may live long: none in much more memory than it needs.
  const WorkspacePool::Block block =
      WorkspacePool::instance().take(static_cast<size_t>(bytes), 1.25);
  return torch::stable::from_blob(block.data, sizes, strides, x.device(), dtype,
                                  [block](void*) { WorkspacePool::instance().give(block); });
}

constexpr int64_t kPooledBytes = int64_t{1} << 20;  // smaller ones are malloc's

// The same, contiguous.
inline Tensor pooled_empty(const Tensor& x, const std::vector<int64_t>& sizes, ScalarType dtype,
                           int64_t element_bytes) {
  int64_t count = 1;
  std::vector<int64_t> strides(sizes.size());
  for (size_t i = sizes.size(); i-- > 0; count *= sizes[i]) strides[i] = count;
  if (count * element_bytes < kPooledBytes) return torch::stable::new_empty(x, sizes, dtype);
  return pooled_empty(x, sizes, strides, dtype, element_bytes);
}
// The same, of x's dtype.
inline Tensor pooled_empty(const Tensor& x, const std::vector<int64_t>& sizes) {
  return pooled_empty(x, sizes, x.scalar_type(), static_cast<int64_t>(x.element_size()));
}

// An image (N, C, H, W) of that dtype in that layout.
inline Tensor pooled_image(const Tensor& x, const std::array<int64_t, 4>& size, MemoryFormat layout,
                           ScalarType dtype, int64_t element_bytes) {
  const int64_t C = size[1], H = size[2], W = size[3];
  if (size[0] * C * H * W * element_bytes < kPooledBytes) {
    return empty_image(x, size, dtype, layout);
  }
  const std::vector<int64_t> strides = layout == MemoryFormat::ChannelsLast
                                           ? std::vector<int64_t>{C * H * W, 1, C * W, C}
                                           : std::vector<int64_t>{C * H * W, H * W, W, 1};
  return pooled_empty(x, {size.begin(), size.end()}, strides, dtype, element_bytes);
}
// The same, of x's dtype.
inline Tensor pooled_image(const Tensor& x, const std::array<int64_t, 4>& size,
                           MemoryFormat layout) {
  return pooled_image(x, size, layout, x.scalar_type(), static_cast<int64_t>(x.element_size()));
}

// An image (N, C, H, W) with the sizes, dtype and strides of a dense one.
inline Tensor pooled_like(const Tensor& x) {
  const auto bytes = static_cast<int64_t>(x.element_size());
  if (x.numel() * bytes < kPooledBytes) return torch::stable::empty_like(x);
  return pooled_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)},
                      {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}, x.scalar_type(), bytes);
}

}  // namespace fastseg
