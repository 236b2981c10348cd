// The gradient of a convolution's weights on the CPU.
#pragma once

#include "conv_bn/conv_bn.h"

namespace fastseg {

// The gradient in weight (K, C, R, S) of one group, in the layout and dtype of weight, from dy
// (N, K, Ho, Wo) and x (N, C, H, W). `winograd` takes F(3, 4) along both axes: 3x3, stride 1,
// float32. The same bits for any number of threads.
Tensor conv_weight_gradient_cpu(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                const IntList& stride, const IntList& padding,
                                const IntList& dilation, bool winograd);

}  // namespace fastseg
