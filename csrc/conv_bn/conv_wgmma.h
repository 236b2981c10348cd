// The convolution for compute capability 9.0 (conv_wgmma_cuda.cu), seen from the host.
#pragma once

#include "common/cuda.h"
#include "conv_bn/conv_gemm.h"

namespace fastseg {

// Whether the kernel computes a layer of these axes: the rest is what bulk copies can address. A
// 3x3 layer fits up to rate 127.
inline bool wgmma_serves(const ConvAxis& rows, const ConvAxis& cols) {
  const auto fits = [](const ConvAxis& a) {
    const int64_t reach = int64_t{a.taps - 1} * a.dilation, high = a.padding - reach;
    return reach <= 255 && a.padding >= -127 && a.padding <= 128 && high >= -128 && high <= 127 &&
           a.stride <= 8 && a.in + high > -a.padding;
  };
  return device_limits().major == 9 && fits(rows) && fits(cols);
}

// How the kernel shares out a layer: columns of a tile, blocks, and the microseconds that it takes
// with them by what was measured (on an H200, of 132 multiprocessors).
struct WgmmaPlan {
  int columns, blocks;
  double us;
};
WgmmaPlan plan_conv_wgmma(const ConvForward& conv, bool moments);

// Sets the schedule of `conv`: tiles of kConvTile pixels in the order of memory.
void schedule_conv_wgmma(ConvForward& conv, const WgmmaPlan& plan);

// The same as launch_conv_forward, but `moments` gets two rows for each tile of pixels, and
// conv.whole must hold. T is Half or BFloat16.
template <typename T>
void launch_conv_wgmma(const ConvForward& conv, int columns, const StreamK& stream_k, const T* x,
                       const T* residual, Moments<float>* moments, T* z, cudaStream_t stream);

}  // namespace fastseg
