// What the CPU and the CUDA form of conv_bn_act share: torch's convolution and the layout of y.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/layout.h"

namespace fastseg {

using IntList = std::vector<int64_t>;  // (height, width)
using OptionalTensor = std::optional<Tensor>;
using OptionalSizes = std::optional<IntList>;

// torch's own convolution, on whatever device x is on.
inline Tensor torch_convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                const IntList& stride, const IntList& padding,
                                const IntList& dilation, int64_t groups) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{from(x),
                                    from(weight),
                                    from(bias),
                                    from(stride),
                                    from(padding),
                                    from(dilation),
                                    from(false),  // not transposed
                                    from(IntList{0, 0}),
                                    from(groups)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// relu(conv2d(x, weight, bias) + residual) by cuDNN, one group; throws where it cannot.
inline Tensor torch_convolution_relu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                     const OptionalTensor& residual, const IntList& stride,
                                     const IntList& padding, const IntList& dilation) {
  using torch::stable::detail::from;
  constexpr int64_t kGroups = 1;
  if (!residual.has_value()) {
    std::array<StableIValue, 7> stack{from(x),      from(weight),  from(OptionalTensor(bias)),
                                      from(stride), from(padding), from(dilation),
                                      from(kGroups)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::cudnn_convolution_relu", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  // The scale of the residual, a Scalar, is 1 if absent.
  std::array<StableIValue, 9> stack{from(x),
                                    from(weight),
                                    from(*residual),
                                    from(std::optional<double>{}),
                                    from(OptionalTensor(bias)),
                                    from(stride),
                                    from(padding),
                                    from(dilation),
                                    from(kGroups)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cudnn_convolution_add_relu", "", stack.data(),
                                               TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// torch's gradients of that convolution in x and weight, where dx and dweight are not null, in the
// layout that image_layout gives those.
inline void torch_convolution_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                       const IntList& stride, const IntList& padding,
                                       const IntList& dilation, int64_t groups, Tensor* dx,
                                       Tensor* dweight) {
  using torch::stable::detail::from;
  if (dx == nullptr && dweight == nullptr) return;
  const bool wanted[3] = {dx != nullptr, dweight != nullptr, false};
  std::array<StableIValue, 11> stack{from(dy),
                                     from(x),
                                     from(weight),
                                     from(OptionalSizes{}),  // of a bias
                                     from(stride),
                                     from(padding),
                                     from(dilation),
                                     from(false),  // not transposed
                                     from(IntList{0, 0}),
                                     from(groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted, 3))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  Tensor gradients[3];
  for (int i = 0; i < 3; ++i) gradients[i] = torch::stable::detail::to<Tensor>(stack[i]);
  if (dx != nullptr) *dx = dense(gradients[0], image_layout(x));
  if (dweight != nullptr) *dweight = dense(gradients[1], image_layout(weight));
}

// How the elements of a dense (N, C, H, W) tensor lie in memory: as N * C planes of H * W elements,
// or, channels-last, as N * H * W pixels of C elements.
struct DenseLayout {
  int64_t N, C, HW;
  bool channels_last;
};

inline torch::headeronly::MemoryFormat memory_format(const DenseLayout& layout) {
  using torch::headeronly::MemoryFormat;
  return layout.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

inline DenseLayout dense_layout(const Tensor& y) {
  FASTSEG_CHECK(y.dim() == 4, "conv_bn_act: expected 4 dimensions, got ", y.dim());
  const int64_t N = y.size(0), C = y.size(1), H = y.size(2), W = y.size(3);
  const bool pixels = (y.stride(1) == 1 || C == 1) && (y.stride(3) == C || W == 1) &&
                      (y.stride(2) == W * C || H == 1) && (y.stride(0) == H * W * C || N == 1);
  const bool planes = y.is_contiguous();
  FASTSEG_CHECK(pixels || planes,
                "conv_bn_act: the convolution's output must be contiguous or channels-last");
  return {N, C, H * W, pixels && C > 1};
}

// `t` with the memory layout of y, so that both can be walked with one index.
inline Tensor with_layout(const Tensor& t, const Tensor& y, const DenseLayout& layout) {
  FASTSEG_CHECK(t.dim() == 4 && t.size(0) == y.size(0) && t.size(1) == y.size(1) &&
                    t.size(2) == y.size(2) && t.size(3) == y.size(3) &&
                    t.scalar_type() == y.scalar_type(),
                "conv_bn_act: the residual or gradient must have the output's shape and dtype");
  return torch::stable::contiguous(t, memory_format(layout));
}

}  // namespace fastseg
