// Sizes of global_conv2d and the checks that guard memory.
//
// y = l2(l1(x)) + r2(r1(x)), where l1 and r2 have k x 1 kernels, l2 and r1 have 1 x k ones, padded
// to keep the size. All images are channels last. The tap form of one stage: columns
// [2 (vertical, horizontal)][k][K], of which column (direction, tap, channel) at a pixel meets that
// channel of the pixel at distance tap - k / 2 in that direction.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/host_device.h"
#include "common/layout.h"

namespace fastseg {

struct GlobalConv {
  int64_t N, C, H, W;  // input
  int64_t K, taps;     // channels behind the first stage and of the output; k

  int64_t reach() const { return taps / 2; }
  int64_t pixels() const { return N * H * W; }
  FASTSEG_HOST_DEVICE int64_t columns() const { return 2 * taps * K; }
};

inline GlobalConv global_conv(const Tensor& x, int64_t K, int64_t taps) {
  FASTSEG_CHECK(x.dim() == 4, "global_conv2d: x must be (N, C, H, W), got ", x.dim(),
                " dimensions");
  FASTSEG_CHECK(taps >= 1 && taps % 2 == 1, "global_conv2d: kernel size must be odd, got ", taps);
  return {x.size(0), x.size(1), x.size(2), x.size(3), K, taps};
}

// (K, C, k, 1) or (K, C, 1, k), and (K,).
inline void check_stage(const GlobalConv& g, const Tensor& weight, const Tensor& bias,
                        int64_t channels, bool vertical) {
  FASTSEG_CHECK(weight.dim() == 4 && weight.size(0) == g.K && weight.size(1) == channels &&
                    weight.size(vertical ? 2 : 3) == g.taps && weight.size(vertical ? 3 : 2) == 1,
                "global_conv2d: weights must be (", g.K, ", ", channels, ", ",
                vertical ? g.taps : 1, ", ", vertical ? 1 : g.taps, ")");
  FASTSEG_CHECK(bias.dim() == 1 && bias.size(0) == g.K, "global_conv2d: biases must be (", g.K,
                ",)");
}

// Two images of one shape and dtype, rows counted over all images.
inline void check_gradients(const Tensor& vertical, const Tensor& horizontal, int64_t begin,
                            int64_t end) {
  FASTSEG_CHECK(vertical.dim() == 4 && horizontal.dim() == 4 &&
                    vertical.scalar_type() == horizontal.scalar_type(),
                "gcn_expand: both images must be (N, K, H, W) of one dtype");
  for (int64_t i = 0; i < 4; ++i) {
    FASTSEG_CHECK(vertical.size(i) == horizontal.size(i),
                  "gcn_expand: both images must have one shape");
  }
  FASTSEG_CHECK(0 <= begin && begin <= end && end <= vertical.size(0) * vertical.size(2),
                "gcn_expand: rows [", begin, ", ", end, ") must lie in [0, N * H) = [0, ",
                vertical.size(0) * vertical.size(2), ")");
}

}  // namespace fastseg
