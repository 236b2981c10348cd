// Images between planes and pixels, by tiles that are transposed in registers.
#include <torch/csrc/stable/ops.h>

#include "conv_bn/pixels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/pooled_tensor.h"
#include "conv_engine/conv_engine.h"

namespace fastseg {
namespace {

using namespace conv_engine;  // NOLINT: the kernels' own namespace

#define FASTSEG_KERNEL_FILE "conv_bn/pixels_kernel.inl"
#include "common/foreach_isa.inl"

// Copies between planes and pixels: torch's moves 1.4 GB/s a core.
void transpose_images(const Tensor& from, const Tensor& to, bool to_pixels) {
  constexpr int64_t kBlock = 64;  // pixels
  const int64_t C = from.size(1), HW = from.size(2) * from.size(3), blocks = ceil_div(HW, kBlock);
  const float* src = from.const_data_ptr<float>();
  float* dst = to.mutable_data_ptr<float>();
  parallel_tasks(from.size(0) * blocks, [&](int64_t task) {
    const int64_t image = task / blocks * C * HW, first = task % blocks * kBlock;
    const int64_t count = std::min(kBlock, HW - first);
    if (to_pixels) {
      FASTSEG_ISA_CALL(transpose)(src + image + first, HW, C, count, dst + image + first * C, C);
    } else {
      FASTSEG_ISA_CALL(transpose)(src + image + first * C, C, count, C, dst + image + first, HW);
    }
  });
}

}  // namespace

Tensor pixels_of(const Tensor& t) {
  if (t.stride(1) == 1 || t.size(1) == 1) return t;
  if (t.scalar_type() != ScalarType::Float || !t.is_contiguous()) {
    return torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
  }
  Tensor pixels =
      pooled_image(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, MemoryFormat::ChannelsLast);
  transpose_images(t, pixels, true);
  return pixels;
}

Tensor in_layout(const Tensor& pixels, MemoryFormat layout) {
  if (layout != MemoryFormat::Contiguous || pixels.is_contiguous() ||
      pixels.scalar_type() != ScalarType::Float) {
    return dense(pixels, layout);
  }
  Tensor planes =
      pooled_image(pixels, {pixels.size(0), pixels.size(1), pixels.size(2), pixels.size(3)},
                   MemoryFormat::Contiguous);
  transpose_images(pixels, planes, false);
  return planes;
}

}  // namespace fastseg
