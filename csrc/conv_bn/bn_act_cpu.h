// What follows a convolution on the CPU, between its translation units.
#pragma once

#include <tuple>

#include "conv_bn/conv_bn.h"

namespace fastseg {

// activation(z + residual), in place.
void add_activate_cpu(Tensor& z, const OptionalTensor& residual, double slope);

// z = activation(batch norm of y by its own statistics + residual). Returns z, mean and biased
// variance (C,), the latter two in the accumulation type.
std::tuple<Tensor, Tensor, Tensor> bn_act_stats_cpu(const Tensor& y,
                                                    const OptionalTensor& bn_weight,
                                                    const OptionalTensor& bn_bias,
                                                    const OptionalTensor& residual, double eps,
                                                    double negative_slope);

// Its backward. Returns dy, the gradients of bn_weight and bn_bias in the accumulation type, and
// that of the residual (no elements without one).
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward_cpu(
    const Tensor& dz, const Tensor& y, const Tensor& mean, const Tensor& var,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& residual,
    double eps, double negative_slope);

}  // namespace fastseg
