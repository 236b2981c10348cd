// Device-wide sorting and scanning: CUB on a GPU, the standard library in the emulation.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <utility>

#include "common/cuda.h"
#include "common/dispatch.h"

#if defined(FASTSEG_EMULATE)
#include <algorithm>
#include <numeric>
#else
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#endif

namespace fastseg {

using WideKey = unsigned __int128;

#if !defined(FASTSEG_EMULATE)
namespace detail {

// Calls step(workspace, bytes) twice, as CUB wants it: for the size, then with a workspace.
template <typename Step>
void with_workspace(const Tensor& like, const char* what, const Step& step) {
  size_t bytes = 0;
  check_cuda(step(nullptr, bytes), what);
  Tensor workspace =
      torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  check_cuda(step(workspace.mutable_data_ptr(), bytes), what);
}

// halves[i] = 64 bits of keys[order[i]], from bit `shift` on; a null order is 0, 1, 2 ..., which is
// then written to `positions`.
template <typename Key>
__global__ void take_half(const Key* keys, const int32_t* order, int64_t count, int shift,
                          uint64_t* halves, int32_t* positions) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  halves[i] = static_cast<uint64_t>(keys[order ? order[i] : i] >> shift);
  if (!order) positions[i] = static_cast<int32_t>(i);
}

template <typename Key>
__global__ void gather_keys(const Key* keys, const int32_t* order, int64_t count, Key* sorted) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) sorted[i] = keys[order[i]];
}

}  // namespace detail
#endif

// Sorts `count` keys of uint64_t or WideKey by bits [0, bits). order[i] is the place that sorted[i]
// came from; equal keys keep their order. Workspace is allocated on like's device.
template <typename Key>
void radix_sort(const Tensor& like, const Key* keys, Key* sorted, int32_t* order, int64_t count,
                int bits, cudaStream_t stream) {
#if defined(FASTSEG_EMULATE)
  static_cast<void>(like);
  static_cast<void>(stream);
  emulation::submit([=] {
    const int unused = static_cast<int>(8 * sizeof(Key)) - bits;
    std::iota(order, order + count, 0);
    std::stable_sort(order, order + count, [&](int32_t a, int32_t b) {
      return static_cast<Key>(keys[a] << unused) < static_cast<Key>(keys[b] << unused);
    });
    for (int64_t i = 0; i < count; ++i) sorted[i] = keys[order[i]];
  });
#else
  const auto words = [&](ScalarType type) { return torch::stable::new_empty(like, {count}, type); };
  Tensor halves = words(ScalarType::Long), sorted_halves = words(ScalarType::Long);
  Tensor positions = words(ScalarType::Int);
  auto* half = static_cast<uint64_t*>(halves.mutable_data_ptr());
  auto* sorted_half = static_cast<uint64_t*>(sorted_halves.mutable_data_ptr());
  auto *from = static_cast<int32_t*>(positions.mutable_data_ptr()), *to = order;
  const unsigned blocks = static_cast<unsigned>(ceil_div<int64_t>(count, 256));
  if (bits > 64) std::swap(from, to);  // two sorts, the second of which ends in `order`
  for (int shift = 0; shift < bits; shift += 64) {
    launch(detail::take_half<Key>, blocks, 256, 0, stream, keys,
           shift == 0 ? nullptr : static_cast<const int32_t*>(from), count, shift, half, from);
    const int end = bits - shift < 64 ? bits - shift : 64;
    detail::with_workspace(like, "radix sort", [&](void* workspace, size_t& bytes) {
      return cub::DeviceRadixSort::SortPairs(workspace, bytes, half, sorted_half, from, to,
                                             static_cast<int>(count), 0, end, stream);
    });
    std::swap(from, to);
  }
  launch(detail::gather_keys<Key>, blocks, 256, 0, stream, keys, static_cast<const int32_t*>(order),
         count, sorted);
#endif
}

// sums[i] = values[0] + ... + values[i].
inline void inclusive_sum(const Tensor& like, const int32_t* values, int32_t* sums, int64_t count,
                          cudaStream_t stream) {
#if defined(FASTSEG_EMULATE)
  static_cast<void>(like);
  static_cast<void>(stream);
  emulation::submit([=] { std::partial_sum(values, values + count, sums); });
#else
  detail::with_workspace(like, "prefix sum", [&](void* workspace, size_t& bytes) {
    return cub::DeviceScan::InclusiveSum(workspace, bytes, values, sums, static_cast<int>(count),
                                         stream);
  });
#endif
}

}  // namespace fastseg
