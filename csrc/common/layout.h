// Memory layout of images (N, C, H, W): NCHW or channels last (NHWC). The stable ABI cannot tell
// them apart, so the rule is here and, for fake kernels, in fastseg/ops/_layout.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>

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

// An uninitialised image on x's device.
inline Tensor empty_image(const Tensor& x, std::array<int64_t, 4> size, ScalarType dtype,
                          MemoryFormat layout) {
  return torch::stable::empty({size.data(), size.size()}, dtype, std::nullopt, x.device(),
                              std::nullopt, layout);
}

}  // namespace fastseg
