// The convolution of conv_act on tensor cores for layers whose taps mostly read padding, as in
// atrous pyramids: what torch's convolution multiplies by zeros there, this one skips.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/check.h"
#include "common/cuda.h"
#include "common/dispatch.h"
#include "conv_bn/conv_bn.h"

namespace fastseg {

// One axis of a convolution.
struct ConvAxis {
  int in, out, taps, stride, padding, dilation;
};

// The output positions of an axis, cut where the set of taps that stay inside the image changes.
struct Segments {
  static constexpr int kMax = 8;
  int count;
  int begin[kMax + 1];
};

inline Segments tap_segments(const ConvAxis& a) {
  std::vector<int> cuts{0, a.out};
  for (int t = 0; t < a.taps; ++t) {
    // Tap t of position o reads o * stride + offset; it is inside for o in [first, end).
    const int64_t offset = int64_t{t} * a.dilation - a.padding;
    const int64_t first = offset >= 0 ? 0 : ceil_div<int64_t>(-offset, a.stride);
    const int64_t end = offset >= a.in ? 0 : (a.in - 1 - offset) / a.stride + 1;
    for (const int64_t cut : {first, end}) {
      if (0 < cut && cut < a.out) cuts.push_back(static_cast<int>(cut));
    }
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  Segments s{static_cast<int>(cuts.size()) - 1, {}};
  if (s.count > Segments::kMax) s = {1, {0, a.out}};  // one class: no tap is skipped for sure
  if (s.count > 1) std::copy(cuts.begin(), cuts.end(), s.begin);
  if (s.count == 1) s.begin[1] = a.out;
  return s;
}

// The share of an axis' (position, tap) pairs that lie inside the image.
inline double inside_share(const ConvAxis& a) {
  int64_t inside = 0;
  for (int t = 0; t < a.taps; ++t) {
    const int64_t offset = int64_t{t} * a.dilation - a.padding;
    for (int o = 0; o < a.out; ++o) {
      const int64_t at = int64_t{o} * a.stride + offset;
      inside += at >= 0 && at < a.in;
    }
  }
  return static_cast<double>(inside) / (static_cast<double>(a.out) * a.taps);
}

struct DirectConv {
  int N, C, K;  // C input, K output channels, multiples of 8
  ConvAxis rows, cols;
  Segments row_segments, col_segments;
  float slope;
};

// z = activation(x * weight + bias + residual), all channels last; bias and residual may be null.
// T is Half or BFloat16.
template <typename T>
void launch_direct_conv(const DirectConv& conv, const T* x, const T* weight, const T* bias,
                        const T* residual, T* z, cudaStream_t stream);

}  // namespace fastseg
