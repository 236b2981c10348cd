// What every convolution kernel of ours does with its sums.
#pragma once

#include "common/cuda.h"
#include "common/dispatch.h"

namespace fastseg {

template <typename T>
struct ConvEpilogue {
  const T* bias;      // (K,), or null
  const T* residual;  // as z, or null
  T* z;
  float slope;  // of the activation for values below 0: 0 is ReLU, 1 none
  bool whole;   // 16-byte accesses to all of them; then K is a multiple of 8

  // z[at + i] = activation(values[i] + bias[channel + i] + residual[at + i]) for i < min(8, left).
  __device__ __forceinline__ void store(float (&values)[8], int64_t at, int channel,
                                        int left) const {
    T added[8], result[8];
    if (bias) {
      load_vector(bias + channel, left, whole, added);
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] += static_cast<float>(added[e]);
    }
    if (residual) {
      load_vector(residual + at, left, whole, added);
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] += static_cast<float>(added[e]);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float below = slope == 0 ? 0.0f : values[e] * slope;
      result[e] = static_cast<T>(values[e] <= 0 ? below : values[e]);
    }
    store_vector(z + at, left, whole, result);
  }
};

}  // namespace fastseg
