// Bilinear resize fused with argmax or softmax on CUDA: one thread per output pixel walks over the
// classes; the resized logits exist only in registers. The source is small and read through L1.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "common/check.h"
#include "common/cuda.h"
#include "common/dispatch.h"
#include "common/layout.h"
#include "upsample/upsample.h"

namespace fastseg {
namespace upsample {
namespace {

// The resized logits of one output pixel, in the arithmetic of PyTorch's CUDA kernel: along x, then
// along y, each sum rounded once with its first product.
template <typename T>
struct Pixel {
  using acc = typename Accumulate<T>::type;
  const T *top_left, *top_right, *bottom_left, *bottom_right;
  int64_t step;  // between classes
  Tap<acc> row, col;

  __device__ Pixel(const Resize& r, const T* logits, int64_t n, int y, int x)
      : step(r.channels_last ? 1 : r.rows.in * r.cols.in),
        row(r.rows.tap<acc>(y, true)),
        col(r.cols.tap<acc>(x, true)) {
    const T* image = logits + n * r.C * r.rows.in * r.cols.in;
    const int64_t pixel = r.channels_last ? r.C : 1;
    const auto at = [&](int64_t i, int64_t j) { return image + (i * r.cols.in + j) * pixel; };
    top_left = at(row.i0, col.i0);
    top_right = at(row.i0, col.i1);
    bottom_left = at(row.i1, col.i0);
    bottom_right = at(row.i1, col.i1);
  }

  __device__ __forceinline__ acc at(int64_t c) const {
    const auto value = [&](const T* p) { return static_cast<acc>(p[c * step]); };
    const acc top = fma(col.w0, value(top_left), col.w1 * value(top_right));
    const acc bottom = fma(col.w0, value(bottom_left), col.w1 * value(bottom_right));
    return fma(row.w0, top, row.w1 * bottom);
  }
};

// A NaN is larger than all numbers and the first of equals wins, as in torch.argmax.
template <typename T, typename Label>
__global__ void argmax_kernel(Resize r, const T* logits, Label* labels,
                              typename Accumulate<T>::type* probs) {
  using acc = typename Accumulate<T>::type;
  const int H = static_cast<int>(r.rows.out), W = static_cast<int>(r.cols.out);
  for_each_in_rows(r.N, H, W, [&](int64_t n, int y, int x) {
    const Pixel<T> pixel(r, logits, n, y, x);
    acc best = pixel.at(0);
    int label = 0;
    for (int c = 1; c < r.C; ++c) {
      const acc value = pixel.at(c);
      if (value > best || (value != value && best == best)) best = value, label = c;
    }
    const int64_t at = (n * H + y) * W + x;
    labels[at] = static_cast<Label>(label);
    if (probs == nullptr) return;
    acc sum = 0;
    for (int c = 0; c < r.C; ++c) sum += exp(pixel.at(c) - best);
    probs[at] = 1 / sum;
  });
}

template <typename T>
__global__ void softmax_kernel(Resize r, const T* logits, T* probs) {
  using acc = typename Accumulate<T>::type;
  const int H = static_cast<int>(r.rows.out), W = static_cast<int>(r.cols.out);
  for_each_in_rows(r.N, H, W, [&](int64_t n, int y, int x) {
    const Pixel<T> pixel(r, logits, n, y, x);
    acc best = pixel.at(0);
    for (int c = 1; c < r.C; ++c) {
      const acc value = pixel.at(c);
      best = value > best ? value : best;
    }
    acc sum = 0;
    for (int c = 0; c < r.C; ++c) sum += exp(pixel.at(c) - best);
    const acc factor = 1 / sum;
    for (int c = 0; c < r.C; ++c) {
      probs[((n * r.C + c) * H + y) * W + x] = static_cast<T>(exp(pixel.at(c) - best) * factor);
    }
  });
}

std::tuple<Tensor, Tensor> upsample_argmax_cuda(const Tensor& logits, int64_t H, int64_t W,
                                                bool align_corners, bool return_prob) {
  const MemoryFormat layout = image_layout(logits);
  const Resize r = make_resize(logits, layout, H, W, align_corners);
  FASTSEG_CHECK(r.C <= 32768, "upsample_argmax: at most 32768 classes fit int16, got ", r.C);
  const DeviceGuard guard(logits);
  const auto label_type = r.C <= 256 ? ScalarType::Byte : ScalarType::Short;
  const auto prob_type =
      logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor labels = torch::stable::new_empty(logits, {r.N, H, W}, label_type);
  Tensor prob = return_prob ? torch::stable::new_empty(logits, {r.N, H, W}, prob_type)
                            : torch::stable::new_empty(logits, {0}, prob_type);
  if (r.N == 0) return {labels, prob};
  const Tensor x = dense(logits, layout);
  dispatch_floating(x, "upsample_argmax", [&](auto tag) {
    using T = decltype(tag);
    using acc = typename Accumulate<T>::type;
    const RowGrid g(r.N, H, W);
    const T* from = x.const_data_ptr<T>();
    acc* probs = return_prob ? prob.mutable_data_ptr<acc>() : nullptr;
    const cudaStream_t stream = current_stream(x);
    if (r.C <= 256) {
      launch(argmax_kernel<T, uint8_t>, g.grid, g.block, 0, stream, r, from,
             labels.mutable_data_ptr<uint8_t>(), probs);
    } else {
      launch(argmax_kernel<T, int16_t>, g.grid, g.block, 0, stream, r, from,
             labels.mutable_data_ptr<int16_t>(), probs);
    }
  });
  return {labels, prob};
}

Tensor upsample_softmax_cuda(const Tensor& logits, int64_t H, int64_t W, bool align_corners) {
  const MemoryFormat layout = image_layout(logits);
  const Resize r = make_resize(logits, layout, H, W, align_corners);
  const DeviceGuard guard(logits);
  Tensor probs = torch::stable::new_empty(logits, {r.N, r.C, H, W});
  if (r.N == 0) return probs;
  const Tensor x = dense(logits, layout);
  dispatch_floating(x, "upsample_softmax", [&](auto tag) {
    using T = decltype(tag);
    const RowGrid g(r.N, H, W);
    launch(softmax_kernel<T>, g.grid, g.block, 0, current_stream(x), r, x.const_data_ptr<T>(),
           probs.mutable_data_ptr<T>());
  });
  return probs;
}

}  // namespace
}  // namespace upsample

FASTSEG_CUDA_IMPL(m) {
  m.impl("upsample_argmax", TORCH_BOX(&upsample::upsample_argmax_cuda));
  m.impl("upsample_softmax", TORCH_BOX(&upsample::upsample_softmax_cuda));
}

}  // namespace fastseg
