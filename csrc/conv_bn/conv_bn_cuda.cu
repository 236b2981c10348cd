// Convolution + batch norm + activation (+ residual) on CUDA: our convolutions on tensor cores or
// torch's, as conv_choice.h says, and what follows them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "common/counters.h"
#include "common/cuda.h"
#include "common/dispatch.h"
#include "conv_bn/bn_act.h"
#include "conv_bn/conv_bn.h"
#include "conv_bn/conv_choice.h"
#include "conv_bn/conv_wgmma.h"

namespace fastseg {
namespace {

// 128 columns of a tile where that wastes little, else 64.
bool use_wide_tile(int64_t columns) {
  return ceil_div<int64_t>(columns, 128) * 128 * 4 < ceil_div<int64_t>(columns, 64) * 64 * 5;
}

// Two blocks on each multiprocessor, unless they have too little to do.
void set_blocks(Schedule& schedule) {
  constexpr int64_t kLeastSteps = 8;
  const int64_t useful = std::max<int64_t>(1, schedule.steps / kLeastSteps);
  schedule.blocks =
      static_cast<int>(std::min<int64_t>(2 * device_limits().multiprocessors, useful));
}

StreamK exchange(const Tensor& x, const Schedule& schedule, int columns, Tensor& workspace) {
  const int64_t floats = int64_t{schedule.blocks} * kConvTile * columns;
  workspace = torch::stable::new_empty(x, {floats + 2 * schedule.blocks}, ScalarType::Float);
  float* data = workspace.mutable_data_ptr<float>();
  return {data, reinterpret_cast<uint64_t*>(data + floats), launch_stamp()};
}

// Calls fn(T{}) for the types of our kernels.
template <typename Fn>
void dispatch_tensor_cores(const Tensor& x, const Fn& fn) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return fn(Half{});
    case ScalarType::BFloat16:
      return fn(BFloat16{});
    default:
      return fn(float{});
  }
}

// The branches of `conv` as a schedule. Where their classes are too many, fewer taps are skipped.
void plan(ConvForward& conv, bool wide, int64_t element_size) {
  const int depth_steps = ceil_div(conv.C * static_cast<int>(element_size), 64);
  const int columns = wide ? 128 : 64;
  const auto whole = [](const ConvAxis& a) { return Segments{1, {0, a.out}}; };
  for (int detail = 2; detail >= 0; --detail) {
    conv.schedule = {};
    bool fits = true;
    for (int i = 0; i < conv.branches; ++i) {
      ConvBranch& b = conv.branch[i];
      b.row_segments = detail > 0 ? tap_segments(b.rows) : whole(b.rows);
      b.col_segments = detail > 1 ? tap_segments(b.cols) : whole(b.cols);
      fits = fits &&
             add_branch(conv.schedule, b, i, conv.N, ceil_div(b.K, columns),
                        [&](uint64_t taps) { return __builtin_popcountll(taps) * depth_steps; });
    }
    if (fits) break;
  }
  set_blocks(conv.schedule);
}

// Launches the branches of `conv`, whose weights and axes are set; see launch_conv_forward.
void run_forward(ConvForward& conv, const Tensor& x, const OptionalTensor& residual, Tensor& z,
                 Tensor* moments) {
  conv.N = static_cast<int>(x.size(0));
  conv.C = static_cast<int>(x.size(1));
  conv.x_stride = static_cast<int>(pixel_stride(x));
  conv.z_stride = static_cast<int>(z.size(1));
  int64_t widest = 0;
  for (int i = 0; i < conv.branches; ++i) widest = std::max<int64_t>(widest, conv.branch[i].K);
  const bool wide = use_wide_tile(widest);
  dispatch_tensor_cores(x, [&](auto tag) {
    using T = decltype(tag);
    const T* added = residual.has_value() ? residual->const_data_ptr<T>() : nullptr;
    conv.whole = z.size(1) % 8 == 0 && aligned_16(added);
    for (int i = 0; i < conv.branches; ++i) {
      const ConvBranch& b = conv.branch[i];
      conv.whole = conv.whole && b.K % 8 == 0 && aligned_16(static_cast<const char*>(b.bias));
    }
    const auto partials_of = [&](int64_t rows_of_tile) -> Moments<float>* {
      if (moments == nullptr) return nullptr;
      const int64_t tiles = ceil_div<int64_t>(z.size(0) * z.size(2) * z.size(3), kConvTile);
      *moments =
          torch::stable::new_empty(x, {tiles * rows_of_tile, 3 * z.size(1)}, ScalarType::Float);
      return reinterpret_cast<Moments<float>*>(moments->mutable_data_ptr<float>());
    };
    if constexpr (sizeof(T) == 2) {
      if (use_wgmma(conv)) {
        FASTSEG_COUNT("conv.cuda_wgmma");
        const WgmmaPlan plan = plan_conv_wgmma(conv, moments != nullptr);
        schedule_conv_wgmma(conv, plan);
        Tensor workspace;
        const StreamK stream_k = exchange(x, conv.schedule, plan.columns, workspace);
        return launch_conv_wgmma<T>(conv, plan.columns, stream_k, x.const_data_ptr<T>(), added,
                                    partials_of(2), z.mutable_data_ptr<T>(), current_stream(x));
      }
    }
    plan(conv, wide, static_cast<int64_t>(x.element_size()));
    Moments<float>* const partials = partials_of(1);
    Tensor workspace;
    const StreamK stream_k = exchange(x, conv.schedule, wide ? 128 : 64, workspace);
    launch_conv_forward<T>(conv, wide, stream_k, x.const_data_ptr<T>(), added, partials,
                           z.mutable_data_ptr<T>(), current_stream(x));
  });
}

// Our convolution of a layer that `serves` accepts, with the activation; `moments` as above.
Tensor our_convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual, const Geometry& g, double slope,
                       Tensor* moments = nullptr) {
  const ConvAxis rows = axis_of(x, weight, g, 0), cols = axis_of(x, weight, g, 1);
  const int64_t K = weight.size(0);
  Tensor z = empty_image(x, {x.size(0), K, rows.out, cols.out}, x.scalar_type(),
                         MemoryFormat::ChannelsLast);
  const Tensor filters = torch::stable::contiguous(weight, MemoryFormat::ChannelsLast);
  OptionalTensor biases, added;
  if (bias.has_value()) biases = torch::stable::contiguous(*bias);
  if (residual.has_value()) added = with_layout(*residual, z, dense_layout(z));
  ConvForward conv{};
  conv.slope = static_cast<float>(slope);
  conv.branches = 1;
  conv.branch[0] = {filters.data_ptr(),
                    biases.has_value() ? biases->data_ptr() : nullptr,
                    static_cast<int>(K),
                    0,
                    0,
                    rows,
                    cols,
                    {},
                    {}};
  run_forward(conv, x, added, z, moments);
  return z;
}

// Sets z to relu(conv2d(x) + bias + residual) by cuDNN; false if this cuDNN has no engine for it.
bool cudnn_fused(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                 const OptionalTensor& residual, const Geometry& g, Tensor* z) {
  static std::mutex mutex;
  static std::set<std::vector<int64_t>> refused;
  std::vector<int64_t> key{static_cast<int64_t>(x.scalar_type()), residual.has_value()};
  for (int i = 0; i < 4; ++i) key.insert(key.end(), {x.size(i), weight.size(i)});
  for (int i = 0; i < 2; ++i) key.insert(key.end(), {g.stride[i], g.padding[i], g.dilation[i]});
  {
    const std::lock_guard lock(mutex);
    if (refused.count(key) > 0) return false;
  }
  try {
    FASTSEG_COUNT("conv_act.cudnn_fused");
    *z = torch_convolution_relu(x, weight, *bias, residual, g.stride, g.padding, g.dilation);
    return true;
  } catch (const std::runtime_error&) {
    const std::lock_guard lock(mutex);
    refused.insert(key);
    return false;
  }
}

Tensor conv_act_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& residual, const IntList& stride, const IntList& padding,
                     const IntList& dilation, int64_t groups, double slope, bool allow_tf32) {
  const DeviceGuard guard(x);
  const Geometry g{stride, padding, dilation, groups};
  if (serves(x, weight, g, allow_tf32) && forward_pays(x, weight, g, false)) {
    FASTSEG_COUNT("conv_act.cuda_own");
    return our_convolution(x, weight, bias, residual, g, slope);
  }
  Tensor z;
  if (cudnn_fuses(x, weight, bias, g, slope) && cudnn_fused(x, weight, bias, residual, g, &z)) {
    return z;
  }
  // The bias with the rest: torch adds it in a pass of its own.
  z = torch_convolution(x, weight, std::nullopt, stride, padding, dilation, groups);
  add_activate_(z, bias, residual, slope);
  return z;
}

// y = convolution, its mean and biased variance.
std::tuple<Tensor, Tensor, Tensor> conv_stats_cuda(const Tensor& x, const Tensor& weight,
                                                   const OptionalTensor& bias,
                                                   const IntList& stride, const IntList& padding,
                                                   const IntList& dilation, int64_t groups,
                                                   bool allow_tf32) {
  const DeviceGuard guard(x);
  const Geometry g{stride, padding, dilation, groups};
  if (serves(x, weight, g, allow_tf32) && forward_pays(x, weight, g, true)) {
    FASTSEG_COUNT("conv_stats.cuda_own");
    Tensor moments;
    Tensor y = our_convolution(x, weight, bias, std::nullopt, g, 1, &moments);
    const BatchStats stats = merged_stats(y, moments, moments.size(0));
    return {y, stats.mean, stats.var};
  }
  Tensor y = torch_convolution(x, weight, bias, stride, padding, dilation, groups);
  const BatchStats stats = batch_stats(y);
  return {y, stats.mean, stats.var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_act_cuda(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& residual,
    const IntList& stride, const IntList& padding, const IntList& dilation, int64_t groups,
    double eps, double slope, bool allow_tf32) {
  const DeviceGuard guard(x);
  const auto [y, mean, var] =
      conv_stats_cuda(x, weight, bias, stride, padding, dilation, groups, allow_tf32);
  Tensor z = normalize_activate(y, {mean, var}, {bn_weight, bn_bias, eps, slope}, residual);
  return {z, y, mean, var};
}

// The gradient of x is a convolution of dy with the filters turned around, for stride 1.
ConvAxis turned(const ConvAxis& a) {
  return {a.out, a.in, a.taps, 1, a.dilation * (a.taps - 1) - a.padding, a.dilation};
}

Tensor input_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight, const Geometry& g) {
  const Tensor filters =
      torch::stable::contiguous(torch::stable::transpose(weight, 0, 1), MemoryFormat::ChannelsLast);
  Tensor dx = empty_image(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(),
                          MemoryFormat::ChannelsLast);
  ConvForward conv{};
  conv.slope = 1;
  conv.branches = 1;
  const ConvAxis rows = axis_of(x, weight, g, 0), cols = axis_of(x, weight, g, 1);
  conv.branch[0] = {filters.data_ptr(),
                    nullptr,
                    static_cast<int>(x.size(1)),
                    0,
                    1,
                    turned(rows),
                    turned(cols),
                    {},
                    {}};
  run_forward(conv, dy, std::nullopt, dx, nullptr);
  return dx;
}

Tensor weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight, const Geometry& g) {
  ConvWeightGradient conv{};
  conv.N = static_cast<int>(x.size(0));
  conv.C = static_cast<int>(x.size(1));
  conv.K = static_cast<int>(weight.size(0));
  conv.x_stride = static_cast<int>(pixel_stride(x));
  conv.dy_stride = static_cast<int>(pixel_stride(dy));
  conv.whole = 1;  // C is a multiple of 8
  conv.rows = axis_of(x, weight, g, 0);
  conv.cols = axis_of(x, weight, g, 1);
  const bool wide = use_wide_tile(conv.C);
  const int tiles = ceil_div(conv.K, kConvTile), columns = ceil_div(conv.C, wide ? 128 : 64);
  for (int tap = 0; tap < conv.rows.taps * conv.cols.taps; ++tap) {
    int top, bottom, left, right;
    inside_range(conv.rows, tap / conv.cols.taps, &top, &bottom);
    inside_range(conv.cols, tap % conv.cols.taps, &left, &right);
    const int64_t pixels = int64_t{conv.N} * (bottom - top) * (right - left);
    const int64_t steps = std::max<int64_t>(1, ceil_div<int64_t>(pixels, 32));
    add_run(conv.schedule, 0, tap, 0, tiles, static_cast<int>(steps), columns);
  }
  set_blocks(conv.schedule);
  Tensor dweight = torch::stable::empty_like(weight);
  Tensor filters = torch::stable::contiguous(dweight, MemoryFormat::ChannelsLast);
  Tensor workspace;
  const StreamK stream_k = exchange(x, conv.schedule, wide ? 128 : 64, workspace);
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    launch_conv_weight_gradient<T>(conv, wide, stream_k, x.const_data_ptr<T>(),
                                   dy.const_data_ptr<T>(), filters.mutable_data_ptr<T>(),
                                   current_stream(x));
  };
  x.scalar_type() == ScalarType::Half ? run(Half{}) : run(BFloat16{});
  if (filters.data_ptr() != dweight.data_ptr()) torch::stable::copy_(dweight, filters);
  return dweight;
}

std::tuple<Tensor, Tensor> conv_backward_cuda(const Tensor& dy, const Tensor& x,
                                              const Tensor& weight, const IntList& stride,
                                              const IntList& padding, const IntList& dilation,
                                              int64_t groups, bool need_x, bool need_weight,
                                              bool allow_tf32) {
  const DeviceGuard guard(x);
  const Geometry g{stride, padding, dilation, groups};
  Tensor dx = torch::stable::new_empty(x, {0}), dweight = torch::stable::new_empty(x, {0});
  if (serves(x, weight, g, allow_tf32)) {
    const ConvAxis rows = axis_of(x, weight, g, 0), cols = axis_of(x, weight, g, 1);
    const bool input = need_x && g.stride[0] == 1 && g.stride[1] == 1 &&
                       ours_pays(x, weight.size(0), x.size(1), turned(rows), turned(cols), false);
    const bool filters = need_weight && x.scalar_type() != ScalarType::Float && !chosen("torch") &&
                         (chosen_own() || mma_cost(rows, cols) < 1);
    const Tensor gradient =
        input || filters ? torch::stable::contiguous(dy, MemoryFormat::ChannelsLast) : dy;
    const bool aligned = pixel_stride(gradient) > 0;
    if (input && aligned) {
      FASTSEG_COUNT("conv_backward.cuda_own_input");
      dx = input_gradient(gradient, x, weight, g);
      need_x = false;
    }
    if (filters && aligned) {
      FASTSEG_COUNT("conv_backward.cuda_own_weight");
      dweight = weight_gradient(gradient, x, weight, g);
      need_weight = false;
    }
  }
  torch_convolution_backward(dy, x, weight, stride, padding, dilation, groups,
                             need_x ? &dx : nullptr, need_weight ? &dweight : nullptr);
  return {dx, dweight};
}

// activation(conv2d(x, weights[i], biases[i], "same" padding, dilations[i])) for every i, and tail
// (N, channels, 1, 1) repeated over the image, concatenated: one launch where our kernels serve.
Tensor conv_branches_cuda(const Tensor& x, const std::vector<Tensor>& weights,
                          const std::vector<Tensor>& biases, const IntList& dilations,
                          const OptionalTensor& tail, double slope, bool allow_tf32) {
  const size_t count = weights.size();
  FASTSEG_CHECK(count > 0 && biases.size() == count && dilations.size() == count,
                "conv_branches: every branch needs a weight, a bias and a dilation");
  const DeviceGuard guard(x);
  const IntList one{1, 1};
  ConvForward conv{};
  conv.slope = static_cast<float>(slope);
  conv.branches = static_cast<int>(count);
  bool served = count <= kMaxBranches;
  std::vector<IntList> paddings, spacings;
  std::vector<Tensor> kept;  // what the branches point to
  int64_t channels = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& weight = weights[i];
    const int64_t d = dilations[i];
    paddings.push_back({d * (weight.size(2) - 1) / 2, d * (weight.size(3) - 1) / 2});
    spacings.push_back({d, d});
    const Geometry g{one, paddings[i], spacings[i], 1};
    served = served && serves(x, weight, g, allow_tf32);
    if (served) {
      kept.push_back(torch::stable::contiguous(weight, MemoryFormat::ChannelsLast));
      kept.push_back(torch::stable::contiguous(biases[i]));
      conv.branch[i] = {kept[2 * i].data_ptr(),
                        kept[2 * i + 1].data_ptr(),
                        static_cast<int>(weight.size(0)),
                        static_cast<int>(channels),
                        0,
                        axis_of(x, weight, g, 0),
                        axis_of(x, weight, g, 1),
                        {},
                        {}};
    }
    channels += weight.size(0);
  }
  const int64_t tail_channels = tail.has_value() ? tail->size(1) : 0;
  Tensor z = empty_image(x, {x.size(0), channels + tail_channels, x.size(2), x.size(3)},
                         x.scalar_type(), image_layout(x));
  const auto fill = [&](int64_t first, const Tensor& part) {
    Tensor place = torch::stable::narrow(z, 1, first, part.size(1));
    torch::stable::copy_(place, part);
  };
  if (tail_channels > 0) fill(channels, *tail);
  if (served) {
    FASTSEG_COUNT("conv_branches.cuda_own");
    run_forward(conv, x, std::nullopt, z, nullptr);
    return z;
  }
  channels = 0;
  for (size_t i = 0; i < count; ++i) {
    fill(channels, conv_act_cuda(x, weights[i], biases[i], std::nullopt, one, paddings[i],
                                 spacings[i], 1, slope, allow_tf32));
    channels += weights[i].size(0);
  }
  return z;
}

}  // namespace

FASTSEG_CUDA_IMPL(m) {
  m.impl("conv_act", TORCH_BOX(&conv_act_cuda));
  m.impl("conv_stats", TORCH_BOX(&conv_stats_cuda));
  m.impl("conv_bn_act", TORCH_BOX(&conv_bn_act_cuda));
  m.impl("conv_backward", TORCH_BOX(&conv_backward_cuda));
  m.impl("conv_branches", TORCH_BOX(&conv_branches_cuda));
}

}  // namespace fastseg
