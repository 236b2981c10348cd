// What follows a convolution on CUDA: the statistics of its output, and batch norm, residual and
// activation in one pass.
#pragma once

#include "conv_bn/conv_bn.h"

namespace fastseg {

// Mean and biased variance (C,) of each channel of y, in its accumulation type.
struct __attribute__((visibility("hidden"))) BatchStats {
  Tensor mean, var;
};

BatchStats batch_stats(const Tensor& y);

// The same from partial moments, Moments<float> (slices, C), of y or of what was rounded to it.
BatchStats merged_stats(const Tensor& y, const Tensor& partials, int64_t slices);

struct __attribute__((visibility("hidden"))) BatchNorm {
  OptionalTensor weight, bias;  // (C,), any dtype; absent: 1 and 0
  double eps;
  double slope;  // of the activation, as in conv_gemm.h
};

// activation((y - mean) / sqrt(var + eps) * weight + bias + residual).
Tensor normalize_activate(const Tensor& y, const BatchStats& stats, const BatchNorm& norm,
                          const OptionalTensor& residual);

// activation(z + bias + residual), in place; bias is (C,) in the dtype of z.
void add_activate_(Tensor& z, const OptionalTensor& bias, const OptionalTensor& residual,
                   double slope);

}  // namespace fastseg
