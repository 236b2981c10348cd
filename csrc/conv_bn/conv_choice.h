// Which convolution a layer gets on CUDA: what our kernels and cuDNN's fused ones serve, and which
// is expected to be the fastest, by times measured on an H200.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "common/cuda.h"
#include "common/layout.h"
#include "conv_bn/conv_bn.h"
#include "conv_bn/conv_gemm.h"
#include "conv_bn/conv_wgmma.h"

namespace fastseg {

struct Geometry {
  const IntList &stride, &padding, &dilation;
  int64_t groups;
};

inline ConvAxis axis_of(const Tensor& x, const Tensor& weight, const Geometry& g, int i) {
  const int64_t in = x.size(2 + i), taps = weight.size(2 + i);
  const int64_t out = (in + 2 * g.padding[i] - g.dilation[i] * (taps - 1) - 1) / g.stride[i] + 1;
  const auto narrow = [](int64_t n) { return static_cast<int>(n); };
  return {narrow(in),          narrow(out),          narrow(taps),
          narrow(g.stride[i]), narrow(g.padding[i]), narrow(g.dilation[i])};
}

// Elements from one pixel to the next if t is channels last, maybe some channels of a larger
// tensor, and its pixels are aligned to 16 bytes; else 0.
inline int64_t pixel_stride(const Tensor& t) {
  const int64_t stride = t.stride(3), size = static_cast<int64_t>(t.element_size());
  const bool regular = t.stride(1) == 1 && !t.is_contiguous() && stride >= t.size(1) &&
                       (t.stride(2) == t.size(3) * stride || t.size(2) == 1) &&
                       (t.stride(0) == t.size(2) * t.size(3) * stride || t.size(0) == 1);
  const bool aligned = stride * size % 16 == 0 && aligned_16(static_cast<char*>(t.data_ptr()));
  return regular && aligned && stride <= INT32_MAX ? stride : 0;
}

// What our kernels can compute: one group, channels last, 16 bytes of input channels at a time, in
// float16, bfloat16 or, if allowed, TF32.
inline bool serves(const Tensor& x, const Tensor& weight, const Geometry& g, bool allow_tf32) {
  const ScalarType dtype = x.scalar_type();
  const bool tensor_cores = dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
                            (dtype == ScalarType::Float && allow_tf32);
  if (!tensor_cores || weight.scalar_type() != dtype || g.groups != 1 || x.numel() == 0 ||
      weight.numel() == 0 || x.size(1) * static_cast<int64_t>(x.element_size()) % 16 != 0 ||
      !aligned_16(static_cast<char*>(weight.data_ptr()))) {
    return false;
  }
  const int64_t R = weight.size(2), S = weight.size(3);
  if (R * S > kMaxTaps || std::max(R, S) > 31 || pixel_stride(x) == 0) return false;
  const ConvAxis rows = axis_of(x, weight, g, 0), cols = axis_of(x, weight, g, 1);
  if (rows.out < 1 || cols.out < 1) return false;
  for (const ConvAxis& a : {rows, cols}) {  // positions in 16 bits, also of the gradient's axes
    const int64_t reach = int64_t{a.dilation} * a.taps + a.padding;
    if (std::max<int64_t>(a.in, int64_t{a.out} * a.stride) + reach > INT16_MAX) return false;
  }
  const int64_t pixels = x.size(0) * std::max(x.size(2) * x.size(3), int64_t{rows.out} * cols.out);
  const int64_t tiles = (pixels / kConvTile + 1) * (weight.size(0) / 64 + 1);
  const int64_t steps = tiles * R * S * (x.size(1) / 16 + 1);
  return std::max(pixels, steps) <= INT32_MAX;
}

// FASTSEG_CONV in the environment decides for tests and measurements: "torch"; "own", our kernels;
// "mma" or "wgmma", ours and that one wherever it serves.
inline bool chosen(const char* name) {
  const char* choice = std::getenv("FASTSEG_CONV");
  return choice != nullptr && std::strcmp(choice, name) == 0;
}

inline bool chosen_own() { return chosen("own") || chosen("mma") || chosen("wgmma"); }

// The time of a convolution on mma.sync against that of a library which multiplies all taps, while
// ours skips those that read padding. Measured on compute capability 9, where cuDNN has wgmma; a
// guess elsewhere.
inline double mma_cost(const ConvAxis& rows, const ConvAxis& cols) {
  const double relative = device_limits().major >= 9 ? 0.34 : 0.75;
  return inside_share(rows) * inside_share(cols) / relative;
}

// Microseconds of cuDNN's convolution with bias, residual and ReLU in 16 bits on an H200, to within
// a third for the layers of our networks: tiles of 128x128 (half of that if there are few) in steps
// of 64 channels, rounds of them half of the way to whole ones; large dilations have older kernels.
inline double cudnn_us(int64_t N, int64_t C, int64_t K, const ConvAxis& rows,
                       const ConvAxis& cols) {
  const auto steps = static_cast<double>(ceil_div<int64_t>(C, 64) * rows.taps * cols.taps);
  const int64_t pixels = N * rows.out * cols.out;
  const auto tiles =
      static_cast<double>(ceil_div<int64_t>(pixels, kConvTile) * ceil_div<int64_t>(K, kConvTile));
  const double rounds = tiles / device_limits().multiprocessors;
  const double us =
      steps * (rounds <= 0.55 ? 0.27 : 0.36 * std::max(1.0, (rounds + std::ceil(rounds)) / 2));
  return 5.5 + us * (std::max(rows.dilation, cols.dilation) > 8 ? 1.8 : 1);
}

// A layer of one branch without its tensors, as the plans want it.
inline ConvForward layer_of(int64_t N, int64_t C, int64_t K, const ConvAxis& rows,
                            const ConvAxis& cols) {
  ConvForward conv{};
  conv.N = static_cast<int>(N);
  conv.C = static_cast<int>(C);
  conv.branches = 1;
  conv.branch[0] = {nullptr, nullptr, static_cast<int>(K), 0, 0, rows, cols, {}, {}};
  return conv;
}

// Whether our convolution of N images with axes `rows` and `cols` from C to K channels is expected
// to be faster than torch's, cuDNN; with `statistics` of its output, which cuDNN needs a pass for.
inline bool ours_pays(const Tensor& x, int64_t C, int64_t K, const ConvAxis& rows,
                      const ConvAxis& cols, bool statistics) {
  if (chosen_own()) return true;
  if (chosen("torch")) return false;
  const int64_t N = x.size(0);
  if (x.element_size() == 2 && K % 8 == 0 && wgmma_serves(rows, cols)) {
    constexpr double kBytesOfUs = 3.5e6;
    const double pass =
        statistics ? 3 + 2.0 * static_cast<double>(N * K * rows.out * cols.out) / kBytesOfUs : 0;
    const double ours = plan_conv_wgmma(layer_of(N, C, K, rows, cols), statistics).us;
    return ours < 0.97 * (cudnn_us(N, C, K, rows, cols) + pass);
  }
  return mma_cost(rows, cols) < 1;
}

inline bool forward_pays(const Tensor& x, const Tensor& weight, const Geometry& g,
                         bool statistics) {
  return ours_pays(x, x.size(1), weight.size(0), axis_of(x, weight, g, 0), axis_of(x, weight, g, 1),
                   statistics);
}

// Whether these branches run on wgmma, the faster of ours even where mma.sync skips more taps.
inline bool use_wgmma(const ConvForward& conv) {
  bool serves = conv.whole != 0 && !chosen("mma");
  for (int i = 0; i < conv.branches; ++i) {
    serves = serves && wgmma_serves(conv.branch[i].rows, conv.branch[i].cols);
  }
  return serves;
}

// Layers for which cuDNN has convolutions that end with bias, residual and ReLU.
inline bool cudnn_fuses(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const Geometry& g, double slope) {
  const ScalarType dtype = x.scalar_type();
  return slope == 0 && g.groups == 1 &&
         (dtype == ScalarType::Half || dtype == ScalarType::BFloat16) && x.numel() > 0 &&
         weight.numel() > 0 && bias.has_value() && bias->scalar_type() == dtype &&
         image_layout(x) == MemoryFormat::ChannelsLast &&
         // cuDNN 9 has an engine for large kernels that takes 20 times as long.
         (weight.size(2) * weight.size(3) <= 9 || x.size(1) <= 16);
}

}  // namespace fastseg
