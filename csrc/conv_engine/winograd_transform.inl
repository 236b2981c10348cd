// The transforms of one axis, of kLanes channels at once: input and products of a tile of
// winograd.h to the operands that are multiplied and back.

template <int kOut, int kTaps, class P, int kFirst, int kIn>
FASTSEG_INLINE void input_transform(Winograd<kOut, kTaps, P, kFirst>, const Vec (&d)[kIn],
                                    Vec (&v)[kIn]) {
  using W = Winograd<kOut, kTaps, P, kFirst>;
  constexpr int kZ = W::kZero, kPairs = W::kPairs;
  constexpr auto kCoef = W::coefficients();
  Vec infinity = d[2 * kPairs + kZ];  // the leading coefficient of every polynomial is 1
#pragma GCC unroll 8
  for (int k = 0; k < kPairs; ++k) infinity += d[2 * k + kZ] * kCoef.polynomial[kPairs][k];
  v[W::kProducts - 1] = infinity;
  if constexpr (kZ == 1) {
    Vec zero = d[2 * kPairs];
#pragma GCC unroll 8
    for (int k = 0; k < kPairs; ++k) zero += d[2 * k] * kCoef.polynomial[kPairs][k];
    v[0] = zero;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPairs; ++i) {
    Vec even = d[2 * kPairs - 1 + kZ], odd = d[2 * kPairs - 2 + kZ];
#pragma GCC unroll 8
    for (int k = 0; k < kPairs - 1; ++k) {
      even += d[2 * k + 1 + kZ] * kCoef.polynomial[i][k];
      odd += d[2 * k + kZ] * kCoef.polynomial[i][k];
    }
    v[kZ + 2 * i] = even + odd * kCoef.power[i][1];
    v[kZ + 2 * i + 1] = even - odd * kCoef.power[i][1];
  }
}

template <int kOut, int kTaps, class P, int kFirst, int kIn>
FASTSEG_INLINE void output_transform(Winograd<kOut, kTaps, P, kFirst>, const Vec (&m)[kIn],
                                     Vec (&y)[kOut]) {
  using W = Winograd<kOut, kTaps, P, kFirst>;
  constexpr auto kCoef = W::coefficients();
#pragma GCC unroll 8
  for (int i = 0; i < W::kPairs; ++i) {
    const Vec plus = m[W::kZero + 2 * i], minus = m[W::kZero + 2 * i + 1];
    const Vec even = plus + minus, odd = plus - minus;
#pragma GCC unroll 8
    for (int t = 0; t < kOut; ++t) {
      // Of a sum of two products the compiler might round either first, here so and there so.
      const Vec term = (t + kFirst) % 2 ? odd : even;
      const float power = kCoef.power[i][t + kFirst];
      y[t] = i == 0       ? term * power
             : power == 1 ? y[t] + term
                          : multiply_add(y[t], term, broadcast(power));
    }
  }
  if constexpr (W::kZero == 1) y[0] += m[0];
  y[kOut - 1] += m[W::kProducts - 1];
}

FASTSEG_INLINE void input_transform(BorderedThree, const Vec (&d)[3], Vec (&v)[4]) {
  constexpr float kHalfA = BorderedThree::kA / 2, kHalfB = BorderedThree::kB / 2;
  const Vec even = (d[2] + d[0]) * 0.5f, odd = (d[2] - d[0]) * 0.5f;
  v[0] = even + d[1] * kHalfA;
  v[1] = even - d[1] * kHalfA;
  v[2] = odd - d[1] * kHalfB;
  v[3] = odd + d[1] * kHalfB;
}

FASTSEG_INLINE void output_transform(BorderedThree, const Vec (&m)[4], Vec (&y)[3]) {
  constexpr float kHalfA = BorderedThree::kA / 2, kHalfB = BorderedThree::kB / 2;
  const Vec sum = (m[0] + m[1]) * 0.5f, difference = (m[2] + m[3]) * 0.5f;
  y[0] = sum - difference;
  y[1] = multiply_add((m[0] - m[1]) * kHalfA, m[2] - m[3], broadcast(kHalfB));
  y[2] = sum + difference;
}

FASTSEG_INLINE void input_transform(Bordered, const Vec (&d)[2], Vec (&v)[3]) {
  v[0] = d[0] + d[1];
  v[1] = d[1];
  v[2] = d[0];
}

FASTSEG_INLINE void output_transform(Bordered, const Vec (&m)[3], Vec (&y)[2]) {
  y[0] = m[0] + m[1];
  y[1] = m[0] + m[2];
}

FASTSEG_INLINE void input_transform(Single, const Vec (&d)[1], Vec (&v)[1]) { v[0] = d[0]; }
FASTSEG_INLINE void output_transform(Single, const Vec (&m)[1], Vec (&y)[1]) { y[0] = m[0]; }
