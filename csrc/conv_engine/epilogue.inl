// Bias, residual and activation of output pixels, on the way to memory.

FASTSEG_INLINE Vec activate(Vec v, Activation activation, float slope) {
  if (activation == Activation::kNone) return v;
  // The comparison keeps NaN; slope * v would turn relu(-inf) into NaN.
  const Vec below = activation == Activation::kRelu ? Vec{} : slope * v;
  return v < 0 ? below : v;
}

// kLanes output channels from k on; y and residual (or nullptr) point at their pixel.
FASTSEG_INLINE void finish_vector(const Conv& conv, Vec v, int64_t k, float* y,
                                  const float* residual) {
  v += load(conv.bias + k);
  if (residual) v += load(residual + k);
  v = activate(v, conv.activation, conv.slope);
  if (conv.stream) {
    store_stream(y + k, v);
  } else {
    store(y + k, v);
  }
}

// Output channels [k, k + columns) of one pixel from sums[0..columns).
static inline void finish_pixel(const Conv& conv, int64_t k, int64_t columns, const float* sums,
                                float* y, const float* residual) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes)
    finish_vector(conv, load(sums + i), k + i, y, residual);
  for (; i < columns; ++i) {
    float v = sums[i] + conv.bias[k + i];
    if (residual) v += residual[k + i];
    if (conv.activation != Activation::kNone && v < 0) {
      v = conv.activation == Activation::kRelu ? 0 : conv.slope * v;
    }
    y[k + i] = v;
  }
}
