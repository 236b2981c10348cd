// The weights of a float32 convolution to the form that its kernel reads.
#pragma once

#include <cstdint>

namespace fastseg {
namespace conv_engine {

// Weights (K, C, R, S) where they lie, with strides in elements: negative ones for a kernel that is
// turned round, K and C exchanged for the gradient of the input.
struct Weights {
  const float* data;
  int64_t K, C, R, S;
  int64_t k, c, r, s;

  int64_t taps() const { return R * S; }
  const float* at(int64_t out, int64_t in) const { return data + out * k + in * c; }
};

// Floats of the packed form, the bias behind the weights.
int64_t packed_floats(const Weights& weights, int64_t tile);
// Writes all of them; `bias` has K elements or is null.
void pack_weights(const Weights& weights, const float* bias, int64_t tile, float* packed);

}  // namespace conv_engine
}  // namespace fastseg
