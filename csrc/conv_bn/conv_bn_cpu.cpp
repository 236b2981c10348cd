// Convolution + batch norm + activation (+ residual) on the CPU by torch's convolution and the
// passes of bn_act_cpu.cpp, and the schemas of these ops. Training takes conv_train_cpu.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <tuple>

#include "common/counters.h"
#include "common/layout.h"
#include "conv_bn/bn_act_cpu.h"
#include "conv_bn/conv_bn.h"
#include "conv_bn/conv_weight_gradient.h"

namespace fastseg {
namespace {

Tensor convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const IntList& stride, const IntList& padding, const IntList& dilation,
                   int64_t groups) {
  FASTSEG_COUNT("conv_bn.torch");
  return torch_convolution(x, weight, bias, stride, padding, dilation, groups);
}

// x (N, C_in, H, W), weight (C, C_in / groups, kh, kw), batch norm folded into both; residual has
// the output's shape -> activation(convolution + residual).
Tensor conv_act_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& residual, const IntList& stride, const IntList& padding,
                    const IntList& dilation, int64_t groups, double negative_slope,
                    bool /* allow_tf32 */) {
  Tensor z = convolution(x, weight, bias, stride, padding, dilation, groups);
  add_activate_cpu(z, residual, negative_slope);
  return z;
}

// Training: returns z, y, mean and variance, see bn_act_stats_cpu.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_act_cpu(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& residual,
    const IntList& stride, const IntList& padding, const IntList& dilation, int64_t groups,
    double eps, double negative_slope, bool /* allow_tf32 */) {
  const Tensor y = convolution(x, weight, bias, stride, padding, dilation, groups);
  const auto [z, mean, var] =
      bn_act_stats_cpu(y, bn_weight, bn_bias, residual, eps, negative_slope);
  return {z, y, mean, var};
}

// The convolution's gradients in x and weight, those that are needed, in their layouts; of one that
// is not needed a tensor without elements.
std::tuple<Tensor, Tensor> conv_backward_cpu(const Tensor& dy, const Tensor& x,
                                             const Tensor& weight, const IntList& stride,
                                             const IntList& padding, const IntList& dilation,
                                             int64_t groups, bool need_x, bool need_weight,
                                             bool /* allow_tf32 */) {
  Tensor dx = torch::stable::new_empty(x, {0}), dweight = torch::stable::new_empty(x, {0});
  // Of NCHW images torch's is faster: they would have to be converted.
  const bool own_weight =
      need_weight && groups == 1 && image_layout(dy) == MemoryFormat::ChannelsLast;
  if (own_weight) {
    dweight = conv_weight_gradient_cpu(dy, x, weight, stride, padding, dilation, false);
  }
  torch_convolution_backward(dy, x, weight, stride, padding, dilation, groups,
                             need_x ? &dx : nullptr,
                             need_weight && !own_weight ? &dweight : nullptr);
  return {dx, dweight};
}

}  // namespace

// negative_slope stands for the activation: 0 is ReLU, 1 is none, anything else leaky ReLU.
STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def(
      "conv_act(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] stride, "
      "SymInt[] padding, SymInt[] dilation, SymInt groups, float negative_slope, bool "
      "allow_tf32=False) -> Tensor");
  m.def(
      "conv_bn_act(Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor? residual, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, "
      "float eps, float negative_slope, bool allow_tf32=False) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "conv_backward(Tensor dy, Tensor x, Tensor weight, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, bool need_x, bool need_weight, bool allow_tf32=False) "
      "-> (Tensor, Tensor)");
  m.def(
      "conv_branches(Tensor x, Tensor[] weights, Tensor[] biases, SymInt[] dilations, Tensor? "
      "tail, "
      "float negative_slope, bool allow_tf32=False) -> Tensor");
  // conv_bn_act and bn_act_backward in halves, between which processes may meet (sync_bn.py).
  m.def(
      "conv_stats(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, bool allow_tf32=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "bn_act(Tensor y, Tensor mean, Tensor var, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor? residual, float eps, float negative_slope) -> Tensor");
  m.def(
      "bn_act_backward_sums(Tensor dz, Tensor y, Tensor mean, Tensor var, Tensor? bn_weight, "
      "Tensor? bn_bias, Tensor? residual, float eps, float negative_slope) -> (Tensor, Tensor)");
  m.def(
      "bn_act_backward_apply(Tensor dz, bool gated, Tensor y, Tensor mean, Tensor var, "
      "Tensor? bn_weight, Tensor? bn_bias, Tensor sums, Tensor count, float eps, "
      "float negative_slope) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("conv_act", TORCH_BOX(&conv_act_cpu));
  m.impl("conv_bn_act", TORCH_BOX(&conv_bn_act_cpu));
  m.impl("conv_backward", TORCH_BOX(&conv_backward_cpu));
}

}  // namespace fastseg