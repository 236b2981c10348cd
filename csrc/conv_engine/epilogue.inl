// Bias, residual and activation of output pixels, on the way to memory.

// The larger of v and 0; NaN stays NaN.
FASTSEG_INLINE Vec relu(Vec v) {
#if FASTSEG_ISA_LEVEL >= 2
  return (Vec)_mm512_max_ps(__m512{}, (__m512)v);  // the second operand where one is NaN
#elif FASTSEG_ISA_LEVEL == 1
  return (Vec)_mm256_max_ps(__m256{}, (__m256)v);
#elif defined(__x86_64__)
  return (Vec)_mm_max_ps(__m128{}, (__m128)v);
#else
  return v < 0 ? Vec{} : v;
#endif
}

FASTSEG_INLINE Vec activate(Vec v, Activation activation, float slope) {
  if (activation == Activation::kRelu) return relu(v);
  if (activation == Activation::kNone) return v;
  return v < 0 ? slope * v : v;
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
