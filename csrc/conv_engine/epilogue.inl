// Bias, residual and activation of output pixels, on the way to memory.

// v, or the bound if v is below or above it; NaN stays NaN: the instructions return their second
// operand where one is NaN.
FASTSEG_INLINE Vec at_least(Vec low, Vec v) {
#if FASTSEG_ISA_LEVEL >= 2
  return (Vec)_mm512_max_ps((__m512)low, (__m512)v);
#elif FASTSEG_ISA_LEVEL == 1
  return (Vec)_mm256_max_ps((__m256)low, (__m256)v);
#elif defined(__x86_64__)
  return (Vec)_mm_max_ps((__m128)low, (__m128)v);
#else
  return v < low ? low : v;
#endif
}
FASTSEG_INLINE Vec at_most(Vec high, Vec v) {
#if FASTSEG_ISA_LEVEL >= 2
  return (Vec)_mm512_min_ps((__m512)high, (__m512)v);
#elif FASTSEG_ISA_LEVEL == 1
  return (Vec)_mm256_min_ps((__m256)high, (__m256)v);
#elif defined(__x86_64__)
  return (Vec)_mm_min_ps((__m128)high, (__m128)v);
#else
  return v > high ? high : v;
#endif
}
FASTSEG_INLINE Vec clamp(Vec v, float low, float high) {
  return at_most(Vec{} + high, at_least(Vec{} + low, v));
}
FASTSEG_INLINE Vec relu(Vec v) { return at_least(Vec{}, v); }

// e^v for v from -87 to 87, to about two units in the last place.
FASTSEG_INLINE Vec exponential(Vec v) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = v * 1.44269504f + kShift, n = shifted - kShift;
  Vec r = v - n * 0.693359375f;            // ln 2 in two parts
  r = r + n * 2.12194440e-4f;              // |r| <= ln(2) / 2
  Vec p = r * (1.0f / 5040) + 1.0f / 720;  // Taylor; the next term is 5e-9
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // The integer n sits in the low bits of `shifted`; it becomes the exponent of 2^n.
  return p * (Vec)(((Words)shifted + 127) << 23);
}

// 1 / (1 + e^-v)
FASTSEG_INLINE Vec sigmoid(Vec v) {
  return 1.0f / (1.0f + exponential(clamp(Vec{} - v, -87.0f, 87.0f)));
}

// v times the share of a normal distribution below v, 0.5 v (1 + erf(v / sqrt(2))). The share above
// |v| has the form of Abramowitz and Stegun's 7.1.26, a polynomial in 1 / (1 + 0.26 |v|) times
// e^(-v^2 / 2), here with two more terms and fitted to |v| times the share: off by up to 2.3e-9.
FASTSEG_INLINE Vec gelu(Vec v) {
  const Vec size = at_most(Vec{} + 13.0f, at_least(v, Vec{} - v));
  const Vec t = 1.0f / (1.0f + size * 0.26f);
  Vec p = t * -0.05794435f + 0.15811696f;
  p = p * t + 0.03125936f;
  p = p * t + 0.02537462f;
  p = p * t + 0.1536049f;
  p = p * t + 0.08309844f;
  p = p * t + 0.10649003f;
  return relu(v) - size * (p * t * exponential(size * size * -0.5f));
}

// The other form of it, 0.5 v (1 + tanh(sqrt(2 / pi) (v + 0.044715 v^3))).
FASTSEG_INLINE Vec gelu_tanh(Vec v) {
  return v * sigmoid((v + v * v * v * 0.044715f) * (2 * 0.797884561f));
}

template <Activation kActivation>
FASTSEG_INLINE Vec activate_as(Vec v, float slope) {
  switch (kActivation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:
      return relu(v);
    case Activation::kLeakyRelu:
      return v < 0 ? slope * v : v;
    case Activation::kRelu6:
      return clamp(v, 0.0f, 6.0f);
    case Activation::kHardSwish:
      return v * clamp(v + 3.0f, 0.0f, 6.0f) * (1.0f / 6);
    case Activation::kHardSigmoid:
      return clamp(v + 3.0f, 0.0f, 6.0f) * (1.0f / 6);
    case Activation::kSilu:
      return v * sigmoid(v);
    case Activation::kSigmoid:
      return sigmoid(v);
    case Activation::kGelu:
      return gelu(v);
    case Activation::kGeluTanh:
      return gelu_tanh(v);
  }
}

// Calls fn with the activation as a constant.
template <class Fn>
FASTSEG_INLINE void dispatch_activation(Activation activation, Fn&& fn) {
  switch (activation) {
    case Activation::kNone:
      return fn(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kRelu:
      return fn(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kLeakyRelu:
      return fn(std::integral_constant<Activation, Activation::kLeakyRelu>{});
    case Activation::kRelu6:
      return fn(std::integral_constant<Activation, Activation::kRelu6>{});
    case Activation::kHardSwish:
      return fn(std::integral_constant<Activation, Activation::kHardSwish>{});
    case Activation::kHardSigmoid:
      return fn(std::integral_constant<Activation, Activation::kHardSigmoid>{});
    case Activation::kSilu:
      return fn(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kSigmoid:
      return fn(std::integral_constant<Activation, Activation::kSigmoid>{});
    case Activation::kGelu:
      return fn(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return fn(std::integral_constant<Activation, Activation::kGeluTanh>{});
  }
}

// Those that register tiles apply where they store.
FASTSEG_INLINE bool is_short(Activation activation) { return activation <= Activation::kRelu6; }
FASTSEG_INLINE Vec activate_short(Vec v, Activation activation, float slope) {
  if (activation == Activation::kRelu) return relu(v);
  if (activation == Activation::kNone) return v;
  if (activation == Activation::kRelu6) return clamp(v, 0.0f, 6.0f);
  return v < 0 ? slope * v : v;
}

// A call: inlined into every loop with an epilogue they would double its code.
__attribute__((noinline)) static Vec activate_long(Vec v, Activation activation) {
  dispatch_activation(activation, [&](auto kind) __attribute__((always_inline)) {
    v = activate_as<kind>(v, 0.0f);
  });
  return v;
}

FASTSEG_INLINE Vec activate(Vec v, Activation activation, float slope) {
  return is_short(activation) ? activate_short(v, activation, slope) : activate_long(v, activation);
}

// Bias, residual and activation of one vector of sums.
template <class Conv, class Activate>
FASTSEG_INLINE Vec finish_as(const Conv& conv, Vec sums, Vec bias, Vec residual,
                             const Activate& activate) {
  if (conv.residual_last) return activate(sums + bias) + residual;
  return activate(sums + bias + residual);
}
template <class Conv>
FASTSEG_INLINE Vec finish(const Conv& conv, Vec sums, Vec bias, Vec residual) {
  return finish_as(conv, sums, bias, residual, [&](Vec v) __attribute__((always_inline)) {
    return activate(v, conv.activation, conv.slope);
  });
}

// One vector of output, or those that are stored at once.
template <class Conv, class V>
FASTSEG_INLINE void store_output(const Conv& conv, const V& v, typename Conv::Result* y) {
  if (conv.stream) {
    store_stream(y, v);
  } else {
    store(y, v);
  }
}

// Output channels [k, k + columns) of one pixel from sums[0..columns).
template <class Conv, class Activate>
FASTSEG_INLINE void finish_pixel_as(const Conv& conv, int64_t k, int64_t columns, const float* sums,
                                    typename Conv::Result* y,
                                    const typename Conv::Storage* residual,
                                    const Activate& activate) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    const Vec added = residual ? load(residual + k + i) : Vec{};
    const Vec bias = load(conv.bias + k + i);
    store_output(conv, finish_as(conv, load(sums + i), bias, added, activate), y + k + i);
  }
  if (i < columns) {  // sums and bias are padded to whole vectors, images are not
    const Vec added = residual ? load_part(residual + k + i, columns - i) : Vec{};
    const Vec bias = load(conv.bias + k + i);
    store_part(y + k + i, columns - i, finish_as(conv, load(sums + i), bias, added, activate));
  }
}
template <class Conv>
static inline void finish_pixel(const Conv& conv, int64_t k, int64_t columns, const float* sums,
                                typename Conv::Result* y, const typename Conv::Storage* residual) {
  finish_pixel_as(conv, k, columns, sums, y, residual, [&](Vec v) __attribute__((always_inline)) {
    return activate(v, conv.activation, conv.slope);
  });
}

// The same of a tile's rows, kPanel sums of each: one jump for all of them.
template <class Conv>
__attribute__((noinline)) static void finish_tile(const Conv& conv, int64_t k, int64_t columns,
                                                  const float* sums, int64_t rows,
                                                  const PixelAddress<Conv>* pixels) {
  dispatch_activation(conv.activation, [&](auto kind) __attribute__((always_inline)) {
    for (int64_t r = 0; r < rows; ++r) {
      finish_pixel_as(
          conv, k, columns, sums + r * kPanel, pixels[r].y, pixels[r].residual,
          [&](Vec v) __attribute__((always_inline)) { return activate_as<kind>(v, conv.slope); });
    }
  });
}
