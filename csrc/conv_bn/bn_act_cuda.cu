// Batch norm + activation (+ residual) on CUDA, forward and backward, whole or split where other
// processes add their statistics.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "common/cuda.h"
#include "common/dispatch.h"
#include "common/layout.h"
#include "conv_bn/bn_act.cuh"
#include "conv_bn/bn_act.h"

namespace fastseg {
namespace {

// How a pass over a tensor of this layout is launched.
template <typename T>
struct Pass {
  dim3 grid, block;
  int slices;
  bool whole;  // all accesses are 16 bytes

  template <typename... Pointers>
  explicit Pass(const DenseLayout& l, const Pointers*... pointers) {
    const int64_t groups = ceil_div<int64_t>(l.C, kCount<T>);
    unsigned width = 1;  // channels last: threads of a block side by side over channels
    while (width < kWidth && width < groups) width *= 2;
    block = l.channels_last ? dim3(width, kThreads / width) : dim3(kThreads);
    const int64_t channel_blocks = l.channels_last ? ceil_div<int64_t>(groups, width) : l.C;
    const int64_t positions =
        l.channels_last ? l.N * l.HW : l.N * ceil_div<int64_t>(l.HW, kCount<T>);
    const int64_t useful = positions / (kLeastPositions * (l.channels_last ? block.y : block.x));
    // Channels last: all blocks at once, as the sums of a block cost it more than a channel's do.
    const int64_t wanted = (l.channels_last ? kBlocks : 4 * kBlocks) / channel_blocks;
    slices = static_cast<int>(std::max<int64_t>(1, std::min(wanted, useful)));
    grid = dim3(static_cast<unsigned>(channel_blocks), slices);
    whole = (l.channels_last ? l.C : l.HW) % kCount<T> == 0 && aligned_16(pointers...);
  }
};

// For kernels of kThreads threads that have kWidth channels.
unsigned channel_blocks(int64_t C) { return static_cast<unsigned>(ceil_div<int64_t>(C, kWidth)); }
dim3 merge_block() { return dim3(kWidth, kThreads / kWidth); }

template <typename acc>
constexpr ScalarType kStats = sizeof(acc) == 8 ? ScalarType::Double : ScalarType::Float;

// Batch-norm parameters as acc, null where they are absent. `holder` keeps them alive.
template <typename acc>
const acc* parameters(const OptionalTensor& values, int64_t C, Tensor& holder) {
  if (!values.has_value()) return nullptr;
  FASTSEG_CHECK(values->dim() == 1 && values->size(0) == C,
                "conv_bn_act: batch-norm parameters must have shape (", C, ",)");
  holder = torch::stable::contiguous(torch::stable::to(*values, kStats<acc>));
  return holder.const_data_ptr<acc>();
}

// Calls fn(std::true_type or std::false_type) for the layout.
template <typename Fn>
void dispatch_layout(const DenseLayout& layout, const Fn& fn) {
  layout.channels_last ? fn(std::true_type{}) : fn(std::false_type{});
}

// Statistics, contiguous in the accumulation type.
template <typename acc>
const acc* statistics(const Tensor& values, int64_t size) {
  FASTSEG_CHECK(
      values.numel() == size && values.is_contiguous() && values.scalar_type() == kStats<acc>,
      "conv_bn_act: statistics must be contiguous, in the accumulation type, of ", size,
      " elements");
  return values.const_data_ptr<acc>();
}

// Calls fn(layout, T{}, acc{}, norm) with the norm's parameters converted where they must be.
template <typename Fn>
void with_norm(const Tensor& y, const BatchStats& stats, const BatchNorm& norm, const Fn& fn) {
  const DenseLayout layout = dense_layout(y);
  dispatch_floating(y, "conv_bn_act", [&](auto tag) {
    using acc = typename Accumulate<decltype(tag)>::type;
    Tensor weight, bias;
    const Norm<acc> parameters_of{
        statistics<acc>(stats.mean, layout.C), statistics<acc>(stats.var, layout.C),
        parameters<acc>(norm.weight, layout.C, weight), parameters<acc>(norm.bias, layout.C, bias),
        static_cast<acc>(norm.eps)};
    fn(layout, tag, acc{}, parameters_of);
  });
}

// Gradients of a batch norm's parameters, and (1,) how many values a channel has.
struct ParameterGradients {
  Tensor dweight, dbias, count;
};

// Sums (2, C) of g and g * (y - mean), and g itself where there is a residual; fills `gradients`
// unless null.
std::tuple<Tensor, Tensor> backward_sums(const Tensor& dz, const Tensor& y, const BatchStats& stats,
                                         const BatchNorm& norm, const OptionalTensor& residual,
                                         ParameterGradients* gradients) {
  const bool with_residual = residual.has_value();
  Tensor sums = torch::stable::new_empty(stats.mean, {2, y.size(1)});
  Tensor g = with_residual ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  if (y.numel() == 0) return {torch::stable::zero_(sums), g};
  with_norm(y, stats, norm, [&](const DenseLayout& layout, auto tag, auto acc_tag, auto& n) {
    using T = decltype(tag);
    using acc = decltype(acc_tag);
    const Tensor gradient = with_layout(dz, y, layout);
    Tensor r;
    if (with_residual) r = with_layout(*residual, y, layout);
    const T *values = y.const_data_ptr<T>(), *grads = gradient.const_data_ptr<T>();
    const T* added = with_residual ? r.const_data_ptr<T>() : nullptr;
    T* to = with_residual ? g.mutable_data_ptr<T>() : nullptr;
    const Pass<T> pass(layout, values, grads, added, to);
    Tensor work = torch::stable::new_empty(sums, {pass.slices * layout.C * 2});
    auto* partials = reinterpret_cast<Sums<acc>*>(work.mutable_data_ptr<acc>());
    const cudaStream_t stream = current_stream(y);
    dispatch_layout(layout, [&](auto channels_last) {
      launch(backward_reduce<T, decltype(channels_last)::value, acc>, pass.grid, pass.block, 0,
             stream, layout, pass.whole, grads, values, added, n, static_cast<acc>(norm.slope), to,
             partials);
    });
    const auto data = [&](Tensor ParameterGradients::* member) {
      return gradients ? (gradients->*member).template mutable_data_ptr<acc>() : nullptr;
    };
    launch(merge_sums<acc>, channel_blocks(layout.C), merge_block(), 0, stream, layout.C,
           pass.slices, partials, n, static_cast<acc>(layout.N * layout.HW),
           sums.mutable_data_ptr<acc>(), data(&ParameterGradients::dweight),
           data(&ParameterGradients::dbias), data(&ParameterGradients::count));
  });
  return {sums, g};
}

Tensor backward_dy(const Tensor& dz, bool gated, const Tensor& y, const BatchStats& stats,
                   const BatchNorm& norm, const Tensor& sums, const Tensor& count) {
  Tensor dy = torch::stable::empty_like(y);
  if (y.numel() == 0) return dy;
  with_norm(y, stats, norm, [&](const DenseLayout& layout, auto tag, auto acc_tag, auto& n) {
    using T = decltype(tag);
    using acc = decltype(acc_tag);
    const Tensor gradient = with_layout(dz, y, layout);
    const T *values = y.const_data_ptr<T>(), *grads = gradient.const_data_ptr<T>();
    T* to = dy.mutable_data_ptr<T>();
    const Pass<T> pass(layout, values, grads, to);
    dispatch_layout(layout, [&](auto channels_last) {
      launch(backward_apply<T, decltype(channels_last)::value, acc>, pass.grid, pass.block, 0,
             current_stream(y), layout, pass.whole, grads, gated, values, n,
             statistics<acc>(sums, 2 * layout.C), statistics<acc>(count, 1),
             static_cast<acc>(norm.slope), to);
    });
  });
  return dy;
}

Tensor bn_act_cuda(const Tensor& y, const Tensor& mean, const Tensor& var,
                   const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                   const OptionalTensor& residual, double eps, double slope) {
  const DeviceGuard guard(y);
  return normalize_activate(y, {mean, var}, {bn_weight, bn_bias, eps, slope}, residual);
}

std::tuple<Tensor, Tensor> bn_act_backward_sums_cuda(const Tensor& dz, const Tensor& y,
                                                     const Tensor& mean, const Tensor& var,
                                                     const OptionalTensor& bn_weight,
                                                     const OptionalTensor& bn_bias,
                                                     const OptionalTensor& residual, double eps,
                                                     double slope) {
  const DeviceGuard guard(y);
  return backward_sums(dz, y, {mean, var}, {bn_weight, bn_bias, eps, slope}, residual, nullptr);
}

Tensor bn_act_backward_apply_cuda(const Tensor& dz, bool gated, const Tensor& y, const Tensor& mean,
                                  const Tensor& var, const OptionalTensor& bn_weight,
                                  const OptionalTensor& bn_bias, const Tensor& sums,
                                  const Tensor& count, double eps, double slope) {
  const DeviceGuard guard(y);
  return backward_dy(dz, gated, y, {mean, var}, {bn_weight, bn_bias, eps, slope}, sums, count);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward_cuda(
    const Tensor& dz, const Tensor& y, const Tensor& mean, const Tensor& var,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& residual,
    double eps, double slope) {
  const DeviceGuard guard(y);
  const BatchStats stats{mean, var};
  const BatchNorm norm{bn_weight, bn_bias, eps, slope};
  ParameterGradients gradients{torch::stable::empty_like(mean), torch::stable::empty_like(mean),
                               torch::stable::new_empty(mean, {1})};
  const auto [sums, g] = backward_sums(dz, y, stats, norm, residual, &gradients);
  const bool gated = residual.has_value();
  Tensor dy = backward_dy(gated ? g : dz, gated, y, stats, norm, sums, gradients.count);
  return {dy, gradients.dweight, gradients.dbias, g};
}

}  // namespace

BatchStats batch_stats(const Tensor& y) {
  const DenseLayout layout = dense_layout(y);
  BatchStats stats;
  dispatch_floating(y, "conv_bn_act", [&](auto tag) {
    using T = decltype(tag);
    using acc = typename Accumulate<T>::type;
    stats = {torch::stable::new_empty(y, {layout.C}, kStats<acc>),
             torch::stable::new_empty(y, {layout.C}, kStats<acc>)};
    if (y.numel() == 0) {
      torch::stable::zero_(stats.mean), torch::stable::zero_(stats.var);
      return;
    }
    const T* values = y.const_data_ptr<T>();
    const Pass<T> pass(layout, values);
    Tensor work = torch::stable::new_empty(y, {pass.slices * layout.C * 3}, kStats<acc>);
    auto* partials = reinterpret_cast<Moments<acc>*>(work.mutable_data_ptr<acc>());
    const cudaStream_t stream = current_stream(y);
    dispatch_layout(layout, [&](auto channels_last) {
      launch(moments_kernel<T, decltype(channels_last)::value>, pass.grid, pass.block, 0, stream,
             layout, pass.whole, values, partials);
    });
    launch(merge_moments<T, acc>, channel_blocks(layout.C), merge_block(), 0, stream, layout,
           pass.slices, values, partials, stats.mean.template mutable_data_ptr<acc>(),
           stats.var.template mutable_data_ptr<acc>());
  });
  return stats;
}

BatchStats merged_stats(const Tensor& y, const Tensor& partials, int64_t slices) {
  const DenseLayout layout = dense_layout(y);
  BatchStats stats{torch::stable::new_empty(partials, {layout.C}),
                   torch::stable::new_empty(partials, {layout.C})};
  const auto* moments = reinterpret_cast<const Moments<float>*>(partials.const_data_ptr<float>());
  launch(merge_moments<float, float>, channel_blocks(layout.C), merge_block(), 0, current_stream(y),
         layout, static_cast<int>(slices), static_cast<const float*>(nullptr), moments,
         stats.mean.mutable_data_ptr<float>(), stats.var.mutable_data_ptr<float>());
  return stats;
}

Tensor normalize_activate(const Tensor& y, const BatchStats& stats, const BatchNorm& norm,
                          const OptionalTensor& residual) {
  Tensor z = torch::stable::empty_like(y);
  if (y.numel() == 0) return z;
  with_norm(y, stats, norm, [&](const DenseLayout& layout, auto tag, auto acc_tag, auto& n) {
    using T = decltype(tag);
    using acc = decltype(acc_tag);
    Tensor r;
    if (residual.has_value()) r = with_layout(*residual, y, layout);
    const T* values = y.const_data_ptr<T>();
    const T* added = residual.has_value() ? r.const_data_ptr<T>() : nullptr;
    T* to = z.mutable_data_ptr<T>();
    const Pass<T> pass(layout, values, to, added);
    dispatch_layout(layout, [&](auto channels_last) {
      launch(normalize<T, decltype(channels_last)::value, acc>, pass.grid, pass.block, 0,
             current_stream(y), layout, pass.whole, values, added, n, static_cast<acc>(norm.slope),
             to);
    });
  });
  return z;
}

void add_activate_(Tensor& z, const OptionalTensor& bias, const OptionalTensor& residual,
                   double slope) {
  const bool nothing = !bias.has_value() && !residual.has_value() && slope == 1;
  if (nothing || z.numel() == 0) return;
  const DenseLayout layout = dense_layout(z);
  Tensor b, r;
  if (bias.has_value()) b = torch::stable::contiguous(*bias);
  if (residual.has_value()) r = with_layout(*residual, z, layout);
  dispatch_floating(z, "conv_bn_act", [&](auto tag) {
    using T = decltype(tag);
    T* data = z.mutable_data_ptr<T>();
    const T* biases = bias.has_value() ? b.const_data_ptr<T>() : nullptr;
    const T* added = residual.has_value() ? r.const_data_ptr<T>() : nullptr;
    const int64_t blocks = ceil_div<int64_t>(z.numel(), kThreads * kCount<T>);
    launch(add_activate<T>, static_cast<unsigned>(std::min<int64_t>(blocks, 4 * kBlocks)), kThreads,
           0, current_stream(z), layout, z.numel(), aligned_16(data, added), biases, added, slope,
           data);
  });
}

FASTSEG_CUDA_IMPL(m) {
  m.impl("bn_act", TORCH_BOX(&bn_act_cuda));
  m.impl("bn_act_backward_sums", TORCH_BOX(&bn_act_backward_sums_cuda));
  m.impl("bn_act_backward_apply", TORCH_BOX(&bn_act_backward_apply_cuda));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward_cuda));
}

}  // namespace fastseg
