// The large separable kernel of GCN on CUDA. Both first convolutions are one matrix product: P =
// X W has, for every pixel, the tap form of gcn_conv.h, and reads X once. A second kernel adds P's
// shifted slices, each of which it reads once as well, to the middle maps, which the backward needs
// anyway. A third convolves those: one block makes a square of the output; its left and right half
// make a branch each.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <type_traits>

#include "common/cuda.h"
#include "gcn_conv/gcn_conv.cuh"
#include "gcn_conv/gcn_conv.h"

namespace fastseg {
namespace {

constexpr int kShiftAddBlocks = 8 * 132;     // at most: all at once
constexpr int64_t kTapFormBytes = 48 << 20;  // of P at a time: it stays in the L2 cache

// a (m, k) b (n, k)^T in the dtype of the tap form. Into a tensor of that dtype: autocast, which
// may be on for calls from here, leaves such products alone.
template <typename T>
Tensor product(const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  const Tensor right = torch::stable::transpose(b, 0, 1);
  const int64_t size[] = {a.size(0), b.size(0)};
  if constexpr (std::is_same_v<T, BFloat16>) {  // torch has this overload on CUDA only
    const Tensor out = torch::stable::new_empty(a, {size, 2}, ScalarType::Float);
    std::array<StableIValue, 4> stack{from(a), from(right), from(ScalarType::Float), from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  } else {
    const Tensor out = torch::stable::new_empty(a, {size, 2});
    std::array<StableIValue, 3> stack{from(a), from(right), from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
}

// (N, C, H, W) -> (N * H * W, C), dense.
Tensor pixels_of(const Tensor& x, const GlobalConv& g) {
  const Tensor image = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  const Tensor last = torch::stable::transpose(torch::stable::transpose(image, 1, 3), 1, 2);
  return torch::stable::reshape(last, {g.pixels(), g.C});
}

template <typename T>
Stage<T> stage_of(const GlobalConv& g, const Tensor& weight, const Tensor& bias, int64_t channels,
                  bool vertical) {
  check_stage(g, weight, bias, channels, vertical);
  return {weight.const_data_ptr<T>(),      weight.stride(0),         weight.stride(1),
          weight.stride(vertical ? 2 : 3), bias.const_data_ptr<T>(), bias.stride(0)};
}

// Returns y in the dtype of x and, for the backward, l1(x) and r1(x) in the accumulation type.
std::tuple<Tensor, Tensor, Tensor> gcn_conv_cuda(const Tensor& x, const Tensor& l1,
                                                 const Tensor& l1_bias, const Tensor& l2,
                                                 const Tensor& l2_bias, const Tensor& r1,
                                                 const Tensor& r1_bias, const Tensor& r2,
                                                 const Tensor& r2_bias) {
  const GlobalConv g = global_conv(x, l1.size(0), l1.size(2));
  const DeviceGuard guard(x);
  const cudaStream_t stream = current_stream(x);
  const bool wide = x.scalar_type() == ScalarType::Double;
  const auto output = [&](ScalarType dtype) {
    return empty_image(x, {g.N, g.K, g.H, g.W}, dtype, MemoryFormat::ChannelsLast);
  };
  const ScalarType acc_type = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor y = output(x.scalar_type()), left = output(acc_type), right = output(acc_type);
  dispatch_floating(x, "global_conv2d", [&](auto tag) {
    using T = decltype(tag);
    using acc = typename Accumulate<T>::type;
    const Stages<T> stages{
        {stage_of<T>(g, l1, l1_bias, g.C, true), stage_of<T>(g, r1, r1_bias, g.C, false)},
        {stage_of<T>(g, l2, l2_bias, g.K, false), stage_of<T>(g, r2, r2_bias, g.K, true)}};
    if (y.numel() == 0) return;
    const int64_t columns = ceil_div<int64_t>(g.columns(), 8) * 8;  // rows of 16 bytes
    const int padded = static_cast<int>(ceil_div<int64_t>(g.K, 8) * 8);
    const Tensor first = torch::stable::new_empty(x, {columns, g.C});
    const Tensor second = torch::stable::new_empty(x, {2 * g.taps * padded * padded}, acc_type);
    const RowGrid rows(2 * ceil_div<int64_t>(g.taps, kLoads), g.K, std::max<int64_t>(g.C, 1));
    launch(pack_weights<T, acc>, rows.grid, rows.block, 0, stream, g, stages, columns, padded,
           first.mutable_data_ptr<T>(), second.mutable_data_ptr<acc>());

    const Tensor pixels = pixels_of(x, g);
    const int64_t size = g.H * g.W;
    const int64_t image_bytes = size * columns * static_cast<int64_t>(sizeof(TapForm<T>));
    const int64_t images = std::max<int64_t>(kTapFormBytes / image_bytes, 1);
    for (int64_t n = 0; n < g.N; n += images) {
      const int64_t count = std::min(images, g.N - n), at = n * size * g.K;
      const Tensor some =
          torch::stable::narrow(const_cast<Tensor&>(pixels), 0, n * size, count * size);
      const Tensor tap_form = product<T>(some, first);
      const int64_t blocks = ceil_div<int64_t>(g.W * g.K, kThreads), lines = count * g.H;
      const int64_t rows = std::min(lines, std::max<int64_t>(kShiftAddBlocks / (2 * blocks), 1));
      const dim3 values(static_cast<unsigned>(blocks), static_cast<unsigned>(rows), 2);
      launch(shift_add<T>, values, dim3(kThreads), 0, stream, g, static_cast<int>(lines), stages,
             columns, tap_form.const_data_ptr<TapForm<T>>(), left.mutable_data_ptr<acc>() + at,
             right.mutable_data_ptr<acc>() + at);
    }

    const int width = kTile + static_cast<int>(std::min<int64_t>(g.taps, kTapsOnce)) - 1;
    const int strips = 2 * kTile * width * (std::min(padded, kDepth<acc>) + 4);
    const size_t shared = std::max(strips, kTile * kTile * kSumStride) * sizeof(acc);
    const int64_t tiles = g.N * ceil_div<int64_t>(g.H, kTile) * ceil_div<int64_t>(g.W, kTile);
    const dim3 grid(static_cast<unsigned>(tiles),
                    static_cast<unsigned>(ceil_div<int64_t>(g.K, kOutputs)));
    launch(second_stage<T>, grid, dim3(kThreads), shared, stream, g, stages, padded,
           left.const_data_ptr<acc>(), right.const_data_ptr<acc>(), second.const_data_ptr<acc>(),
           y.mutable_data_ptr<T>());
  });
  return {y, left, right};
}

Tensor gcn_expand_cuda(const Tensor& vertical, const Tensor& horizontal, int64_t kernel_size,
                       int64_t begin, int64_t end) {
  check_gradients(vertical, horizontal, begin, end);
  const GlobalConv g = global_conv(vertical, vertical.size(1), kernel_size);
  const DeviceGuard guard(vertical);
  const Tensor v = torch::stable::contiguous(vertical, MemoryFormat::ChannelsLast);
  const Tensor h = torch::stable::contiguous(horizontal, MemoryFormat::ChannelsLast);
  const Tensor out = torch::stable::new_empty(v, {(end - begin) * g.W, g.columns()});
  if (out.numel() == 0) return out;
  dispatch_floating(v, "gcn_expand", [&](auto tag) {
    using T = decltype(tag);
    const RowGrid rows(end - begin, g.W, g.columns());
    launch(expand<T>, rows.grid, rows.block, 0, current_stream(v), g, begin, end,
           v.const_data_ptr<T>(), h.const_data_ptr<T>(), out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace

FASTSEG_CUDA_IMPL(m) {
  m.impl("gcn_conv", TORCH_BOX(&gcn_conv_cuda));
  m.impl("gcn_expand", TORCH_BOX(&gcn_expand_cuda));
}

}  // namespace fastseg
