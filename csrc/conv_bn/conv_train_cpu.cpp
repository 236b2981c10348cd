// A training step on the CPU: a convolution and its gradients, each by torch or by the engine,
// whose packing of the weights is then part of the call, and around them the passes of
// bn_act_cpu.cpp. Of bfloat16 images the engine multiplies in float32. What the engine computes has
// the same bits for any number of threads. The gradient of the input is, for each phase of the
// input modulo the stride, a convolution of dy with the taps that meet it, turned round.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "common/counters.h"
#include "common/parallel.h"
#include "common/pooled_tensor.h"
#include "common/workspace.h"
#include "conv_bn/bn_act_cpu.h"
#include "conv_bn/conv_bn.h"
#include "conv_bn/conv_weight_gradient.h"
#include "conv_bn/pixels.h"
#include "conv_engine/conv_engine.h"
#include "conv_engine/few_channels.h"
#include "conv_engine/images.h"
#include "conv_engine/pack.h"
#include "conv_engine/run.h"

namespace fastseg {
namespace {

using namespace conv_engine;  // NOLINT: the kernels' own namespace

constexpr int64_t kTorch = -1;  // instead of one of the engine's tiles

// Calls fn(T{}) with the type of the images.
template <typename Fn>
void dispatch_image(const Tensor& x, Fn&& fn) {
  return x.scalar_type() == ScalarType::Float ? fn(float{}) : fn(BFloat16{});
}

// Of a float32 tensor.
Weights weights_of(const Tensor& w) {
  return {w.const_data_ptr<float>(),
          w.size(0),
          w.size(1),
          w.size(2),
          w.size(3),
          w.stride(0),
          w.stride(1),
          w.stride(2),
          w.stride(3)};
}

template <typename T>
Image<T> image_of(T* data, const Tensor& t) {
  return {data, t.stride(0), t.stride(2), t.stride(3)};
}

// Images, their sizes and the geometry are set; `natural` if the size of y follows from them.
template <class Conv>
void run(Conv& conv, const Weights& weights, const float* bias, int64_t tile, bool natural) {
  conv.K = weights.K, conv.C = weights.C, conv.R = weights.R, conv.S = weights.S;
  const int64_t floats = packed_floats(weights, tile);
  Workspace<float> packed(floats);
  pack_weights(weights, bias, tile, packed.data());
  conv.weight = packed.data();
  conv.bias = packed.data() + floats - round_up(conv.K, kPanel);
  conv.stream = is_streamed(conv.pixels() * conv.K, conv.y);
  if (conv.x.data == conv.y.data) {
    FASTSEG_COUNT("conv_train.in_place");
    run_winograd_in_place(conv, tile);
  } else if (tile != 0) {
    FASTSEG_COUNT("conv_train.winograd");
    run_winograd(conv, tile);
  } else if (natural && has_few_channels(conv)) {
    FASTSEG_COUNT("conv_train.few_channels");
    run_few_channels(conv);
  } else {
    FASTSEG_COUNT("conv_train.gemm");
    run_gemm(conv);
  }
  packed.release_beyond(conv.pixels() * conv.K * static_cast<int64_t>(sizeof *conv.y.data));
}

void check(const Tensor& x, const Tensor& weight, const IntList& stride, const IntList& padding,
           const IntList& dilation, int64_t groups, int64_t tile) {
  const auto type = x.scalar_type();
  FASTSEG_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.scalar_type() == type &&
                    (type == ScalarType::Float || type == ScalarType::BFloat16) &&
                    x.size(1) == weight.size(1) && groups == 1,
                "train_conv: the engine takes x (N, C, H, W) and weight (K, C, R, S), float32 or "
                "bfloat16");
  FASTSEG_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2 &&
                    std::min({stride[0], stride[1], dilation[0], dilation[1]}) >= 1 &&
                    std::min(padding[0], padding[1]) >= 0,
                "train_conv: stride, padding and dilation must be (vertical, horizontal), positive "
                "and not negative");
  FASTSEG_CHECK(tile == 0 || tile == 2 || tile == 4,
                "train_conv: tile must be -1 (torch), 0, 2 or 4, got ", tile);
  for (int axis = 0; axis < 2; ++axis) {
    FASTSEG_CHECK(tile == 0 || (weight.size(2 + axis) == 3 && stride[axis] == 1 &&
                                padding[axis] <= 2 * dilation[axis]),
                  "train_conv: Winograd needs a 3x3 kernel, stride 1 and at most twice the "
                  "dilation as padding");
  }
}

int64_t output_size(int64_t size, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t room = size + 2 * padding - dilation * (taps - 1);
  FASTSEG_CHECK(room >= 1, "train_conv: the dilated kernel must fit into the padded input");
  return (room - 1) / stride + 1;
}

// conv2d gives channels last if the input or the weight is.
bool gives_pixels(const Tensor& t) {
  return t.size(1) > 1 && t.stride(1) == 1 && t.stride(3) >= t.size(1);
}

Tensor train_conv_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const IntList& stride, const IntList& padding, const IntList& dilation,
                      int64_t groups, int64_t tile) {
  if (tile == kTorch) {
    FASTSEG_COUNT("conv_train.torch");
    return torch_convolution(x, weight, bias, stride, padding, dilation, groups);
  }
  check(x, weight, stride, padding, dilation, groups, tile);
  const int64_t K = weight.size(0);
  FASTSEG_CHECK(!bias || bias->numel() == K, "train_conv: bias must have ", K, " elements");
  const int64_t Ho = output_size(x.size(2), weight.size(2), stride[0], padding[0], dilation[0]);
  const int64_t Wo = output_size(x.size(3), weight.size(3), stride[1], padding[1], dilation[1]);
  Tensor y = pooled_image(x, {x.size(0), K, Ho, Wo}, MemoryFormat::ChannelsLast);
  if (y.numel() > 0) {
    const Tensor source = pixels_of(x), wide = torch::stable::to(weight, ScalarType::Float);
    Tensor wide_bias;
    if (bias) {
      wide_bias = torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
    }
    dispatch_image(x, [&](auto tag) {
      using T = decltype(tag);
      Convolution<T, float> conv{};
      conv.N = x.size(0), conv.H = x.size(2), conv.W = x.size(3);
      conv.Ho = Ho, conv.Wo = Wo;
      conv.stride_h = stride[0], conv.stride_w = stride[1];
      conv.pad_h = padding[0], conv.pad_w = padding[1];
      conv.dilation_h = dilation[0], conv.dilation_w = dilation[1];
      conv.x = image_of(source.const_data_ptr<T>(), source);
      conv.y = image_of(y.mutable_data_ptr<T>(), y);
      run(conv, weights_of(wide), bias ? wide_bias.const_data_ptr<float>() : nullptr, tile, true);
    });
  }
  const bool pixels = gives_pixels(x) || gives_pixels(weight);
  return in_layout(y, pixels ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Along one axis the input positions phase + stride * j. Position j meets tap r of the kernel at
// (phase + padding - r * dilation) / stride + j of dy, where that is whole: for every `period`-th
// tap from `first` on.
struct Phase {
  int64_t phase, positions;
  int64_t first, period, taps;
  int64_t step, pad;  // of the taps on dy, and in front of it
};

std::vector<Phase> phases_of(int64_t size, int64_t taps, int64_t stride, int64_t padding,
                             int64_t dilation) {
  std::vector<Phase> phases(stride);
  for (int64_t i = 0; i < stride; ++i) {
    Phase& p = phases[i];
    p.phase = i;
    p.positions = i < size ? (size - 1 - i) / stride + 1 : 0;
    p.period = stride / std::gcd(stride, dilation);
    while (p.first < std::min(p.period, taps) && (i + padding - p.first * dilation) % stride != 0) {
      ++p.first;
    }
    p.taps = p.first < p.period && p.first < taps ? (taps - 1 - p.first) / p.period + 1 : 0;
    p.step = p.period * dilation / stride;
    p.pad = (p.taps - 1) * p.step - (i + padding - p.first * dilation) / stride;
  }
  return phases;
}

template <typename T>
void clear(const Image<T>& image, int64_t N, int64_t H, int64_t W, int64_t C) {
  parallel_tasks(N * H, [&](int64_t line) {
    for (int64_t x = 0; x < W; ++x) {
      std::fill_n(image.at(line / H, line % H, x), C, static_cast<T>(0.0f));
    }
  });
}

template <typename T>
void run_input_gradient(const Tensor& dy, const Weights& w, const IntList& stride,
                        const IntList& padding, const IntList& dilation, int64_t tile,
                        const Tensor& dx) {
  const auto whole = image_of(dx.mutable_data_ptr<T>(), dx);
  Convolution<T, float> conv{};
  conv.N = dx.size(0), conv.H = dy.size(2), conv.W = dy.size(3);
  conv.stride_h = conv.stride_w = 1;
  conv.x = image_of(dy.const_data_ptr<T>(), dy);
  const auto columns = phases_of(dx.size(3), w.S, stride[1], padding[1], dilation[1]);
  for (const Phase& down : phases_of(dx.size(2), w.R, stride[0], padding[0], dilation[0])) {
    for (const Phase& right : columns) {
      conv.y = {whole.at(0, down.phase, right.phase), whole.batch, stride[0] * whole.row,
                stride[1] * whole.pixel};
      conv.Ho = down.positions, conv.Wo = right.positions;
      if (conv.N * conv.Ho * conv.Wo * w.C == 0) continue;
      if (down.taps * right.taps * w.K * dy.numel() == 0) {
        clear(conv.y, conv.N, conv.Ho, conv.Wo, w.C);
        continue;
      }
      conv.dilation_h = down.step, conv.dilation_w = right.step;
      conv.pad_h = down.pad, conv.pad_w = right.pad;
      const int64_t last_r = down.first + (down.taps - 1) * down.period;
      const int64_t last_s = right.first + (right.taps - 1) * right.period;
      const Weights turned{w.data + last_r * w.r + last_s * w.s,
                           w.C,
                           w.K,
                           down.taps,
                           right.taps,
                           w.c,
                           w.k,
                           -down.period * w.r,
                           -right.period * w.s};
      run(conv, turned, nullptr, tile, false);
    }
  }
}

Tensor input_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight,
                      const IntList& stride, const IntList& padding, const IntList& dilation,
                      int64_t tile) {
  const Tensor wide = torch::stable::to(weight, ScalarType::Float);
  const Tensor dx =
      pooled_image(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, MemoryFormat::ChannelsLast);
  dispatch_image(x, [&](auto tag) {
    run_input_gradient<decltype(tag)>(dy, weights_of(wide), stride, padding, dilation, tile, dx);
  });
  return in_layout(dx, image_layout(x));
}

// The gradients of x and weight that are needed, in their layouts; else a tensor without elements.
std::tuple<Tensor, Tensor> train_conv_backward_cpu(const Tensor& dy, const Tensor& x,
                                                   const Tensor& weight, const IntList& stride,
                                                   const IntList& padding, const IntList& dilation,
                                                   int64_t groups, int64_t input_tile,
                                                   int64_t weight_tile, bool need_x,
                                                   bool need_weight) {
  Tensor dx = torch::stable::new_empty(x, {0}), dweight = torch::stable::new_empty(x, {0});
  const bool own_x = need_x && input_tile != kTorch;
  const bool own_weight = need_weight && weight_tile != kTorch;
  FASTSEG_CHECK(dy.dim() == 4 && x.dim() == 4 && weight.dim() == 4,
                "train_conv: dy, x and weight must have 4 dimensions");
  const Tensor pixels = own_x || own_weight ? pixels_of(dy) : dy;
  const auto compute_weight = [&] {
    FASTSEG_CHECK(groups == 1, "train_conv: the engine takes one group, got ", groups);
    dweight = conv_weight_gradient_cpu(pixels, pixels_of(x), weight, stride, padding, dilation,
                                       weight_tile != 0);
  };
  // The smaller result lies beside the scratch memory of the other.
  const bool weight_first = weight.numel() < x.numel();
  if (own_weight && weight_first) compute_weight();
  if (own_x) {
    check(x, weight, stride, padding, dilation, groups, input_tile);
    FASTSEG_CHECK(dy.dim() == 4 && dy.scalar_type() == x.scalar_type() && dy.size(0) == x.size(0) &&
                      dy.size(1) == weight.size(0),
                  "train_conv: dy must be the gradient of the convolution's output");
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t size = output_size(x.size(2 + axis), weight.size(2 + axis), stride[axis],
                                       padding[axis], dilation[axis]);
      FASTSEG_CHECK(dy.size(2 + axis) == size, "train_conv: dy must have the output's size, ", size,
                    " along axis ", 2 + axis, ", got ", dy.size(2 + axis));
    }
    dx = input_gradient(pixels, x, weight, stride, padding, dilation, input_tile);
  }
  torch_convolution_backward(dy, x, weight, stride, padding, dilation, groups,
                             need_x && !own_x ? &dx : nullptr,
                             need_weight && !own_weight ? &dweight : nullptr);
  if (own_weight && !weight_first) compute_weight();
  return {dx, dweight};
}

// Turns dy, the gradient of the output, into that of x, of the same shape, by Winograd's algorithm;
// gives the gradient of the weights if it is needed, else a tensor without elements.
Tensor train_conv_backward_in_place_cpu(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                        const IntList& stride, const IntList& padding,
                                        const IntList& dilation, int64_t input_tile,
                                        int64_t weight_tile, bool need_weight) {
  check(x, weight, stride, padding, dilation, 1, input_tile);
  FASTSEG_CHECK(input_tile != 0 && dy.dim() == 4 && dy.scalar_type() == x.scalar_type() &&
                    image_layout(dy) == MemoryFormat::ChannelsLast,
                "train_conv: in place the input's gradient needs Winograd's algorithm and dy in "
                "channels-last memory");
  for (int axis = 0; axis < 2; ++axis) {
    FASTSEG_CHECK(dy.size(axis) == x.size(axis) && dy.size(2 + axis) == x.size(2 + axis) &&
                      padding[axis] == dilation[axis],
                  "train_conv: in place dy must have the shape of x, and the padding must be the "
                  "dilation");
  }
  const Tensor dweight = std::get<1>(train_conv_backward_cpu(
      dy, x, weight, stride, padding, dilation, 1, kTorch, weight_tile, false, need_weight));
  if (dy.numel() > 0) {
    const Tensor wide = torch::stable::to(weight, ScalarType::Float);
    dispatch_image(x, [&](auto tag) {
      run_input_gradient<decltype(tag)>(dy, weights_of(wide), stride, padding, dilation, input_tile,
                                        dy);
    });
  }
  return dweight;
}

// Moves a running statistic towards `factor` times that of a batch.
void update_running(const Tensor& running, const Tensor& batch, double factor, double momentum) {
  FASTSEG_CHECK(running.dim() == 1 && running.size(0) == batch.size(0),
                "train_step: running statistics must have shape (", batch.size(0), ",)");
  dispatch_floating(running, "train_step", [&](auto tag) {
    using T = decltype(tag);
    T* const first = static_cast<T*>(running.mutable_data_ptr());
    const auto move = [&](const auto* from) {
      for (int64_t c = 0; c < running.size(0); ++c) {
        T& to = first[c * running.stride(0)];
        const double old = static_cast<double>(to);
        to = static_cast<T>(old + momentum * (factor * static_cast<double>(from[c]) - old));
      }
    };
    if (batch.scalar_type() == ScalarType::Double) {
      move(batch.const_data_ptr<double>());
    } else {
      move(batch.const_data_ptr<float>());
    }
  });
}

// A step forward: z = activation(batch norm of y + residual), y the convolution, and the mean and
// biased variance of y. Moves the running statistics, if they are given.
std::tuple<Tensor, Tensor, Tensor, Tensor> train_step_cpu(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& residual,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, double momentum,
    const IntList& stride, const IntList& padding, const IntList& dilation, int64_t groups,
    double eps, double negative_slope, int64_t tile) {
  const Tensor y = train_conv_cpu(x, weight, bias, stride, padding, dilation, groups, tile);
  const auto [z, mean, var] =
      bn_act_stats_cpu(y, bn_weight, bn_bias, residual, eps, negative_slope);
  const double count = static_cast<double>(y.size(0) * y.size(2) * y.size(3));
  if (running_mean) update_running(*running_mean, mean, 1, momentum);
  if (running_var) update_running(*running_var, var, count / (count - 1), momentum);
  return {z, y, mean, var};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def(
      "train_conv(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, int tile) -> Tensor");
  m.def(
      "train_conv_backward(Tensor dy, Tensor x, Tensor weight, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, int input_tile, int weight_tile, bool need_x, "
      "bool need_weight) -> (Tensor, Tensor)");
  m.def(
      "train_conv_backward_in_place(Tensor(a!) dy, Tensor x, Tensor weight, SymInt[] stride, "
      "SymInt[] padding, SymInt[] dilation, int input_tile, int weight_tile, bool need_weight) -> "
      "Tensor");
  m.def(
      "train_step(Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor? residual, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, float eps, "
      "float negative_slope, int tile) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("train_conv", TORCH_BOX(&train_conv_cpu));
  m.impl("train_conv_backward", TORCH_BOX(&train_conv_backward_cpu));
  m.impl("train_conv_backward_in_place", TORCH_BOX(&train_conv_backward_in_place_cpu));
  m.impl("train_step", TORCH_BOX(&train_step_cpu));
}

}  // namespace fastseg
