// Resizing of images, also into memory that is given, such as some channels of a concatenation: one
// task per block of output rows and columns.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/isa.h"
#include "common/layout.h"
#include "common/parallel.h"
#include "common/pooled_tensor.h"
#include "upsample/upsample.h"

namespace fastseg {
namespace upsample {
namespace {

// Larger results are written past the caches: else their memory would be read first.
constexpr int64_t kStreamBytes = 4 * 1024 * 1024;
constexpr int64_t kBlockBytes = 256 * 1024;  // two spread rows of a block: a part of L2

// Images of C channels that are neighbours in memory. A planar batch (N, C, H, W) is N * C images
// of one channel, `planes` of them per batch element.
template <typename T>
struct ResizeImages {
  using acc = typename Accumulate<T>::type;
  int64_t images, planes, C;
  ResizeAxis rows, cols;
  const T* in;
  T* out;
  int64_t in_batch, in_plane, in_row, in_pixel, out_batch, out_plane, out_row,
      out_pixel;                     // strides
  bool stream;                       // results are written past the caches
  bool copies;                       // pixels are copied, not blended
  std::vector<int32_t> left, right;  // source columns of each output column
  std::vector<acc> w0, w1;           // and their weights
  int64_t block;                     // values of a row of a block
};

// The pixel that PyTorch's mode "nearest" takes.
int64_t nearest(const ResizeAxis& axis, int64_t i) {
  const float scale = static_cast<float>(axis.in) / static_cast<float>(axis.out);
  return std::min(static_cast<int64_t>(std::floor(static_cast<float>(i) * scale)), axis.in - 1);
}

#define FASTSEG_KERNEL_FILE "upsample/resize_kernel.inl"
#include "common/foreach_isa.inl"

struct TaskBuffer;  // names the scratch memory of a task

bool channels_last(const Tensor& t) { return t.stride(1) == 1 && t.size(1) > 1; }

template <typename T>
void resize_as(const Tensor& x, const Tensor& out, bool align_corners, bool is_nearest) {
  using acc = typename Accumulate<T>::type;
  const int64_t N = x.size(0), C = x.size(1), H = out.size(2), W = out.size(3);
  const bool planar = !channels_last(out);
  ResizeImages<T> r{planar ? N * C : N,
                    planar ? C : 1,
                    planar ? 1 : C,
                    {x.size(2), H, align_corners},
                    {x.size(3), W, align_corners},
                    x.const_data_ptr<T>(),
                    out.mutable_data_ptr<T>(),
                    x.stride(0),
                    x.stride(1),
                    x.stride(2),
                    x.stride(3),
                    out.stride(0),
                    out.stride(1),
                    out.stride(2),
                    out.stride(3),
                    out.numel() * static_cast<int64_t>(sizeof(T)) >= kStreamBytes,
                    is_nearest || (x.size(2) == H && x.size(3) == W),
                    {},
                    {},
                    {},
                    {},
                    0};
  const bool fused = current_isa() >= Isa::kAvx2;
  for (int64_t i = 0; i < W; ++i) {
    Tap<acc> tap = r.cols.template tap<acc>(i, fused);
    if (r.copies) tap.i0 = nearest(r.cols, i);
    r.left.push_back(static_cast<int32_t>(tap.i0));
    r.right.push_back(static_cast<int32_t>(tap.i1));
    r.w0.push_back(tap.w0);
    r.w1.push_back(tap.w1);
  }
  const int64_t fitting = kBlockBytes / static_cast<int64_t>(2 * r.C * sizeof(acc));
  const int64_t width = std::clamp<int64_t>(fitting, 16, W), blocks = (W + width - 1) / width;
  r.block = width * r.C;
  const int64_t threads = torch::stable::get_num_threads();
  // Bands of an image, several tasks per thread; each spreads its first two rows anew.
  const int64_t bands = std::clamp<int64_t>(4 * threads / (r.images * blocks), 1, H);
  const auto kernel = FASTSEG_ISA_CALL(resize_block<T>);
  parallel_tasks(r.images * bands * blocks, [&](int64_t task) {
    const int64_t image = task / (bands * blocks), band = task / blocks % bands;
    const int64_t begin = task % blocks * width;
    kernel(r, image, H * band / bands, H * (band + 1) / bands, begin, std::min(begin + width, W),
           scratch<TaskBuffer, acc>(2 * r.block + r.cols.in * r.C));
  });
}

// x (N, C, h, w) -> out (N, C, H, W): F.interpolate with mode "bilinear" or "nearest". Channels of
// a pixel are neighbours in both or in neither.
void resize_out(const Tensor& x, const Tensor& out, bool align_corners, bool nearest) {
  FASTSEG_CHECK(x.dim() == 4 && out.dim() == 4 && x.size(0) == out.size(0) &&
                    x.size(1) == out.size(1) && x.scalar_type() == out.scalar_type(),
                "resize: x and out must have one dtype, N and C");
  FASTSEG_CHECK(!channels_last(out) || x.stride(1) == 1,
                "resize: x must be channels last where out is");
  if (out.numel() == 0) return;
  FASTSEG_CHECK(x.numel() > 0, "resize: x must have at least one pixel");
  dispatch_floating(x, "resize",
                    [&](auto tag) { resize_as<decltype(tag)>(x, out, align_corners, nearest); });
}

// The same into a new tensor, channels last where x is.
Tensor resize(const Tensor& x, int64_t H, int64_t W, bool align_corners, bool nearest) {
  FASTSEG_CHECK(x.dim() == 4 && H >= 0 && W >= 0, "resize: x must be (N, C, h, w)");
  Tensor out = pooled_image(x, {x.size(0), x.size(1), H, W}, image_layout(x));
  resize_out(x, out, align_corners, nearest);
  return out;
}

}  // namespace
}  // namespace upsample

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def("resize(Tensor x, SymInt H, SymInt W, bool align_corners, bool nearest) -> Tensor");
  m.def("resize_out(Tensor x, Tensor(a!) out, bool align_corners, bool nearest) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("resize", TORCH_BOX(&upsample::resize));
  m.impl("resize_out", TORCH_BOX(&upsample::resize_out));
}

}  // namespace fastseg
