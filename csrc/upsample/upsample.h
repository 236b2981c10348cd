// Where bilinear resizing reads, in the arithmetic of PyTorch's upsample_bilinear2d: the labels of
// two nearly equal logits depend on the last bit. Shared by the CPU and the CUDA kernels.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/check.h"
#include "common/host_device.h"
#include "common/layout.h"

namespace fastseg {

// Output position i of an axis is in[i0] * w0 + in[i1] * w1.
template <typename acc>
struct Tap {
  int64_t i0, i1;
  acc w0, w1;
};

// One axis, rows or columns, resized from `in` to `out` positions.
struct ResizeAxis {
  int64_t in, out;
  bool align_corners;

  // `fused`: PyTorch's builds for AVX2 and later and for CUDA round the source position once.
  template <typename acc>
  FASTSEG_HOST_DEVICE Tap<acc> tap(int64_t i, bool fused) const {
    if (in == out) return {i, i, acc{1}, acc{0}};
    const acc half = static_cast<acc>(0.5), at = static_cast<acc>(i);
    acc source;
    if (align_corners) {
      source = (out > 1 ? static_cast<acc>(in - 1) / static_cast<acc>(out - 1) : acc{0}) * at;
    } else {
      const acc scale = static_cast<acc>(in) / static_cast<acc>(out);
      source = fused ? std::fma(scale, at + half, -half) : scale * (at + half) - half;
      source = source < 0 ? acc{0} : source;
    }
    int64_t i0 = static_cast<int64_t>(source);  // not negative: the cast rounds down
    i0 = i0 < in - 1 ? i0 : in - 1;
    acc w1 = source - static_cast<acc>(i0);
    w1 = w1 < 0 ? acc{0} : w1 > 1 ? acc{1} : w1;
    return {i0, i0 + (i0 < in - 1), acc{1} - w1, w1};
  }
};

namespace upsample {

// Sizes of a resize of logits (N, C, h, w).
struct Resize {
  int64_t N, C;
  ResizeAxis rows, cols;
  bool channels_last;
};

inline Resize make_resize(const Tensor& logits, MemoryFormat layout, int64_t H, int64_t W,
                          bool align_corners) {
  FASTSEG_CHECK(logits.dim() == 4 && logits.size(1) > 0 && logits.size(2) > 0 &&
                    logits.size(3) > 0 && H > 0 && W > 0,
                "upsample: logits must be (N, C, h, w) with at least one class and pixel");
  return {logits.size(0),
          logits.size(1),
          {logits.size(2), H, align_corners},
          {logits.size(3), W, align_corners},
          layout == MemoryFormat::ChannelsLast};
}

}  // namespace upsample
}  // namespace fastseg
