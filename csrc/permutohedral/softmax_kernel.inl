// Soft-max in base 2 over the channels of rows, and over two labels that are one channel.

// 2^x to about 1 ulp, 0 below -126, infinite or at least 2^127 above: 2^floor(x), times a
// polynomial in the rest (minimax, relative error 9e-8).
template <typename V>
inline V power_of_fraction(V f) {
  V p = multiply_add(V() + 1.8775767e-3f, f, V() + 8.9893397e-3f);
  p = multiply_add(p, f, V() + 5.5826318e-2f);
  p = multiply_add(p, f, V() + 2.4015361e-1f);
  p = multiply_add(p, f, V() + 6.9315308e-1f);
  return multiply_add(p, f, V() + 9.9999994e-1f);
}
#if FASTSEG_ISA_LEVEL >= 2
inline __m512 exponential2(__m512 x) {
  return _mm512_scalef_ps(power_of_fraction(_mm512_reduce_ps(x, 9)), x);  // 9: x - floor(x)
}
inline __m256 exponential2(__m256 x) {
  return _mm256_scalef_ps(power_of_fraction(_mm256_reduce_ps(x, 9)), x);
}
#else
template <typename V>
inline V exponential2(V x) {
  using I = decltype(x > x);
  const V low = V() - 127.0f, high = V() + 127.0f;
  V clamped = x > low ? x : low;
  clamped = clamped < high ? clamped : high;
  I whole = __builtin_convertvector(clamped, I);  // towards 0; the comparison is -1 where true
  whole += __builtin_convertvector(whole, V) > clamped;
  const V p = power_of_fraction(clamped - __builtin_convertvector(whole, V));
  const I exponent = (whole + 127) << 23;
  V power;
  __builtin_memcpy(&power, &exponent, sizeof(V));
  return p * power;
}
#endif

// out[p] = the channels of rows[p], at least 8, combined by an associative function of numbers or
// vectors. Eight points at a time: one point's chain of shuffles would stall everything.
template <typename T, typename Combine>
inline void reduce_rows(const T* rows, int points, int width, T* out, Combine combine) {
  const auto of_eight = [&](const auto* v) {
    return combine(combine(combine(v[0], v[4]), combine(v[2], v[6])),
                   combine(combine(v[1], v[5]), combine(v[3], v[7])));
  };
  int p = 0;
#if FASTSEG_ISA_LEVEL >= 1
  if constexpr (sizeof(T) == 4) {
    for (; p + 8 <= points; p += 8) {
      __m256 v[8];
      for (int k = 0; k < 8; ++k) {
        const T* row = rows + (p + k) * width;
        v[k] = _mm256_loadu_ps(row);
        for (int c = 8; c < width; c += 8) v[k] = combine(v[k], _mm256_loadu_ps(row + c));
      }
      transpose(v);
      _mm256_storeu_ps(out + p, of_eight(v));
    }
  }
#endif
  for (; p < points; ++p) {
    const T* row = rows + p * width;
    T part[8];
    for (int k = 0; k < 8; ++k) part[k] = row[k];
    for (int c = 8; c < width; c += 8) {
      for (int k = 0; k < 8; ++k) part[k] = combine(part[k], row[c + k]);
    }
    out[p] = of_eight(part);
  }
}

// Subtracts its largest channel from each row, which soft-max does not notice. False if that is
// not a finite number.
template <typename T>
bool subtract_largest(T* rows, int points, int width) {
  T largest[kTilePoints];
  reduce_rows(rows, points, width, largest, [](auto a, auto b) { return a > b ? a : b; });
  int finite = 1;
  for (int p = 0; p < points; ++p) finite &= largest[p] * 0 == 0;
  for_each_column_stride<T>(width, [&](auto tag, int column, auto stride) {
    using R = decltype(tag);
    T* row = rows + column;
    for (int p = 0; p < points; ++p, row += stride) {
      R shifted = R::load(row);
      shifted.add_to_all(-largest[p]);
      shifted.store(row);
    }
  });
  return finite != 0;
}

// The same for the logits of the unary energies; also false if there is NaN or +inf.
template <typename T>
bool shift_logits(T* rows, int points, int width) {
  int bad = 0;
  for (int i = 0; i < points * width; ++i) bad |= !(rows[i] < static_cast<T>(INFINITY));
  return subtract_largest(rows, points, width) && bad == 0;
}

// rows = 2^rows, channel by channel.
template <typename T>
void exponentials(T* rows, int64_t count) {
  int64_t i = 0;
  if constexpr (sizeof(T) == 4) {
    constexpr int kLanes = sizeof(FloatLane) / sizeof(float);
    for (; i + kLanes <= count; i += kLanes) {
      store_lane(rows + i, exponential2(load_lane<FloatLane>(rows + i)));
    }
    for (; i < count; i += 8) {  // half a register of 16
      auto row = Row<float, 1>::load(rows + i);
      for (int k = 0; k < row.kFull; ++k) row.full[k] = exponential2(row.full[k]);
      if constexpr (Row<float, 1>::kHalf) row.half = exponential2(row.half);
      row.store(rows + i);
    }
  } else {
    for (; i < count; ++i) rows[i] = std::exp2(rows[i]);
  }
}

// Base-2 soft-max over the channels of each row: on return it is inverse[p] * rows[p]. The padding
// is -inf and becomes 0. Without `shift` the largest channel is not subtracted, which is right
// unless a sum comes out too large or too small: then it returns false, and the rows are lost.
template <typename T>
bool softmax_tile(T* rows, int points, int width, bool shift, T* inverse) {
  if (shift) subtract_largest(rows, points, width);
  exponentials(rows, static_cast<int64_t>(points) * width);
  reduce_rows(rows, points, width, inverse, [](auto a, auto b) { return a + b; });
  int outside = 0;
  for (int p = 0; p < points; ++p) {
    outside |= !(inverse[p] > T(1e-30)) | !(inverse[p] < T(1e30));
    inverse[p] = 1 / inverse[p];
  }
  return outside == 0;
}

// positive[i] = 1 / (1 + 2^-x[i]) and, if not null, negative[i] = 1 / (1 + 2^x[i]), for n values
// and those after it up to a multiple of 16. positive may be x.
template <typename T>
void logistic(const T* x, int n, T* positive, T* negative) {
  if constexpr (sizeof(T) == 4) {
    constexpr int kLanes = sizeof(FloatLane) / sizeof(float);
    const FloatLane one = FloatLane() + 1.0f;
    for (int i = 0; i < n; i += kLanes) {
      const FloatLane v = load_lane<FloatLane>(x + i);
      store_lane(positive + i, one / (exponential2(-v) + one));
      if (negative != nullptr) store_lane(negative + i, one / (exponential2(v) + one));
    }
  } else {
    for (int i = 0; i < n; ++i) {
      const T v = x[i];
      positive[i] = 1 / (1 + std::exp2(-v));
      if (negative != nullptr) negative[i] = 1 / (1 + std::exp2(v));
    }
  }
}
