// Resizing of channels-last images into memory that is given, such as some channels of a
// concatenation: one task per band of output rows.
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

#include "common/check.h"
#include "common/dispatch.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "upsample/upsample.h"

namespace fastseg {
namespace upsample {
namespace {

template <typename T>
struct ResizeImages {
  int64_t N, C;
  ResizeAxis rows, cols;
  const T* in;
  T* out;
  int64_t in_batch, in_row, in_pixel, out_batch, out_row, out_pixel;  // strides; of channels 1
  bool nearest;
};

// The pixel that PyTorch's mode "nearest" takes.
int64_t nearest(const ResizeAxis& axis, int64_t i) {
  const float scale = static_cast<float>(axis.in) / static_cast<float>(axis.out);
  return std::min(static_cast<int64_t>(std::floor(static_cast<float>(i) * scale)), axis.in - 1);
}

#define FASTSEG_KERNEL_FILE "upsample/resize_kernel.inl"
#include "common/foreach_isa.inl"

struct TaskBuffer;  // names the scratch memory of a task

// x (N, C, h, w) -> out (N, C, H, W), both with channel stride 1: F.interpolate with mode
// "bilinear" or "nearest".
void resize_out(const Tensor& x, const Tensor& out, bool align_corners, bool nearest) {
  FASTSEG_CHECK(x.dim() == 4 && out.dim() == 4 && x.size(0) == out.size(0) &&
                    x.size(1) == out.size(1) && x.scalar_type() == out.scalar_type(),
                "resize: x and out must have one dtype, N and C");
  const auto channels_last = [](const Tensor& t) { return t.stride(1) == 1 || t.size(1) == 1; };
  FASTSEG_CHECK(channels_last(x) && channels_last(out), "resize: images must be channels last");
  if (out.numel() == 0) return;
  FASTSEG_CHECK(x.numel() > 0, "resize: x must have at least one pixel");
  dispatch_floating(x, "resize", [&](auto tag) {
    using T = decltype(tag);
    using acc = typename Accumulate<T>::type;
    const ResizeImages<T> r{x.size(0),
                            x.size(1),
                            {x.size(2), out.size(2), align_corners},
                            {x.size(3), out.size(3), align_corners},
                            x.const_data_ptr<T>(),
                            out.mutable_data_ptr<T>(),
                            x.stride(0),
                            x.stride(2),
                            x.stride(3),
                            out.stride(0),
                            out.stride(2),
                            out.stride(3),
                            nearest};
    const int64_t lines = r.N * r.rows.out, threads = torch::stable::get_num_threads();
    const int64_t parts = std::min(lines, 4 * threads);
    const auto kernel = FASTSEG_ISA_CALL(resize_rows<T>);
    parallel_tasks(parts, [&](int64_t part) {
      kernel(r, lines * part / parts, lines * (part + 1) / parts,
             scratch<TaskBuffer, acc>((r.cols.in + 1) * r.C));
    });
  });
}

}  // namespace
}  // namespace upsample

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  m.def("resize_out(Tensor x, Tensor(a!) out, bool align_corners, bool nearest) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("resize_out", TORCH_BOX(&upsample::resize_out));
}

}  // namespace fastseg
