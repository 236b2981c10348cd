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
    T biases[8], residuals[8], result[8];
    if (bias) load_vector(bias + channel, left, whole, biases);
    if (residual) load_vector(residual + at, left, whole, residuals);
    finish(values, biases, residuals, result);
    store_vector(z + at, left, whole, result);
  }

  // The `result` of 8 values, with bias and residual loaded beforehand where there are any.
  __device__ __forceinline__ void finish(float (&values)[8], const T (&biases)[8],
                                         const T (&residuals)[8], T (&result)[8]) const {
    if (bias) {
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] += static_cast<float>(biases[e]);
    }
    if (residual) {
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] += static_cast<float>(residuals[e]);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float below = slope == 0 ? 0.0f : values[e] * slope;
      result[e] = static_cast<T>(values[e] <= 0 ? below : values[e]);
    }
  }
};

}  // namespace fastseg
