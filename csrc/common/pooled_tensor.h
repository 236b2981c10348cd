// Output tensors in memory that stays warm between calls.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common/dispatch.h"
#include "common/workspace.h"

namespace fastseg {

// An uninitialised contiguous CPU tensor of the given dtype. Large ones live in the workspace pool
// and go back there when they are freed: a fresh 16 MB tensor costs 4000 page faults, some 3 ms.
inline Tensor pooled_empty(const Tensor& x, const std::vector<int64_t>& sizes, ScalarType dtype,
                           int64_t element_bytes) {
  int64_t count = 1;
  std::vector<int64_t> strides(sizes.size());
  for (size_t i = sizes.size(); i-- > 0; count *= sizes[i]) strides[i] = count;
  const int64_t bytes = count * element_bytes;
  if (bytes < (int64_t{1} << 20)) return torch::stable::new_empty(x, sizes, dtype);
  const WorkspacePool::Block block = WorkspacePool::instance().take(static_cast<size_t>(bytes));
  return torch::stable::from_blob(block.data, sizes, strides, x.device(), dtype,
                                  [block](void*) { WorkspacePool::instance().give(block); });
}
// The same, of x's dtype.
inline Tensor pooled_empty(const Tensor& x, const std::vector<int64_t>& sizes) {
  return pooled_empty(x, sizes, x.scalar_type(), static_cast<int64_t>(x.element_size()));
}

}  // namespace fastseg
