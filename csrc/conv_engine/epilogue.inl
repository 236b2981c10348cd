// Bias, residual and activation of output pixels, on the way to memory.

FASTSEG_INLINE Vec activate(Vec v, Activation activation, float slope) {
  if (activation == Activation::kNone) return v;
  // The comparison keeps NaN; slope * v would turn relu(-inf) into NaN.
  const Vec below = activation == Activation::kRelu ? Vec{} : slope * v;
  return v < 0 ? below : v;
}

// Bias, residual and activation of one vector of sums.
template <class Conv>
FASTSEG_INLINE Vec finish(const Conv& conv, Vec sums, Vec bias, Vec residual) {
  if (conv.residual_last) return activate(sums + bias, conv.activation, conv.slope) + residual;
  return activate(sums + bias + residual, conv.activation, conv.slope);
}

// One vector of output.
template <class Conv>
FASTSEG_INLINE void store_output(const Conv& conv, Vec v, typename Conv::Storage* y) {
  if (conv.stream) {
    store_stream(y, v);
  } else {
    store(y, v);
  }
}

// Output channels [k, k + columns) of one pixel from sums[0..columns).
template <class Conv>
static inline void finish_pixel(const Conv& conv, int64_t k, int64_t columns, const float* sums,
                                typename Conv::Storage* y, const typename Conv::Storage* residual) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    const Vec added = residual ? load(residual + k + i) : Vec{};
    store_output(conv, finish(conv, load(sums + i), load(conv.bias + k + i), added), y + k + i);
  }
  if (i < columns) {  // sums and bias are padded to whole vectors, images are not
    const Vec added = residual ? load_part(residual + k + i, columns - i) : Vec{};
    store_part(y + k + i, columns - i,
               finish(conv, load(sums + i), load(conv.bias + k + i), added));
  }
}
