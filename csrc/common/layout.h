// Memory layout of images (N, C, H, W): NCHW or channels last (NHWC). The stable ABI cannot tell
// them apart, so the rule is here and, for fake kernels, in fastseg/ops/_layout.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastseg {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The layout an op keeps: channels last where the channels of a pixel are neighbours in memory and
// the tensor is not plain NCHW as well.
inline MemoryFormat image_layout(const Tensor& x) {
  const bool channels_last = !x.is_contiguous() && x.stride(1) == 1 && x.size(1) > 1;
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// x itself where it is dense in that layout, else a copy that is.
inline Tensor dense(const Tensor& x, MemoryFormat layout) {
  if (layout == MemoryFormat::Contiguous && x.is_contiguous()) return x;
  return torch::stable::contiguous(x, layout);
}

// Asks Linux for 2 MB pages under a large fresh tensor. Blocks from 32 MB up are mapped anew by
// malloc each time, and faulting them in by 4 KB takes much longer than filling them: 44 MB by two
// threads in 16 ms, with 2 MB pages in 2.1 ms, into memory that is there already in 1.0 ms.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  if (bytes < 32 << 20) return;
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: it may fail
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

// An uninitialised image on x's device.
inline Tensor empty_image(const Tensor& x, std::array<int64_t, 4> size, ScalarType dtype,
                          MemoryFormat layout) {
  Tensor image = torch::stable::empty({size.data(), size.size()}, dtype, std::nullopt, x.device(),
                                      std::nullopt, layout);
  if (x.is_cpu()) {
    const int64_t bytes = image.numel() * static_cast<int64_t>(image.element_size());
    prefer_huge_pages(image.mutable_data_ptr(), bytes);
  }
  return image;
}

}  // namespace fastseg
