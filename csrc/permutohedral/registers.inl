// Registers of the instruction set in use, rows of channels in them, and the 8 x 8 transposition.
// A row holds the channels of one point or vertex, padded to a multiple of 8; kernels take rows in
// column groups of up to 32 channels, which stay in registers.

#if FASTSEG_ISA_LEVEL >= 2
using FloatLane = __m512;
using DoubleLane = __m512d;
inline FloatLane multiply_add(FloatLane a, FloatLane b, FloatLane c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline DoubleLane multiply_add(DoubleLane a, DoubleLane b, DoubleLane c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif FASTSEG_ISA_LEVEL == 1
using FloatLane = __m256;
using DoubleLane = __m256d;
inline DoubleLane multiply_add(DoubleLane a, DoubleLane b, DoubleLane c) {
  return _mm256_fmadd_pd(a, b, c);
}
#else
typedef float FloatLane __attribute__((vector_size(16), may_alias));
typedef double DoubleLane __attribute__((vector_size(16), may_alias));
inline FloatLane multiply_add(FloatLane a, FloatLane b, FloatLane c) { return a * b + c; }
inline DoubleLane multiply_add(DoubleLane a, DoubleLane b, DoubleLane c) { return a * b + c; }
#endif
#if FASTSEG_ISA_LEVEL >= 1
inline __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
#endif

typedef int32_t FloatLaneInts __attribute__((vector_size(sizeof(FloatLane))));
typedef int32_t DoubleLaneInts __attribute__((vector_size(sizeof(DoubleLane) / 2)));

template <typename T>
struct LaneOf {
  using type = FloatLane;
  using ints = FloatLaneInts;
};
template <>
struct LaneOf<double> {
  using type = DoubleLane;
  using ints = DoubleLaneInts;
};

// s in every lane. V() + s would cost an addition, since it turns -0 into +0.
template <typename V, typename T>
inline V broadcast(T s) {
  V v;
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) v[i] = s;
  return v;
}
#if FASTSEG_ISA_LEVEL >= 2
template <>
inline FloatLane broadcast<FloatLane, float>(float s) {
  return _mm512_set1_ps(s);
}
inline __m256 first_half(FloatLane v) { return _mm512_castps512_ps256(v); }
#else
template <typename V>
inline V first_half(V v) {
  return v;
}
#endif

template <typename V, typename T>
inline V load_lane(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V, typename T>
inline void store_lane(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// kEights * 8 consecutive channels in registers: full registers, and a half one where 8 channels
// remain.
template <typename T, int kEights>
struct Row {
  using V = typename LaneOf<T>::type;
  static constexpr int kLanes = sizeof(V) / sizeof(T);
  static constexpr int kFull = kEights * 8 / kLanes;
  static constexpr bool kHalf = kEights * 8 % kLanes != 0;
  static constexpr int kChannels = kEights * 8;
#if FASTSEG_ISA_LEVEL >= 2
  using H = __m256;  // only float rows have a half
#else
  using H = V;
#endif
  V full[kFull > 0 ? kFull : 1];
  H half;

  static Row zero() {
    Row row;
    for (int i = 0; i < kFull; ++i) row.full[i] = V();
    if constexpr (kHalf) row.half = H();
    return row;
  }
  static Row load(const T* p) {
    Row row;
    for (int i = 0; i < kFull; ++i) row.full[i] = load_lane<V>(p + i * kLanes);
    if constexpr (kHalf) row.half = load_lane<H>(p + kFull * kLanes);
    return row;
  }
  void store(T* p) const {
    for (int i = 0; i < kFull; ++i) store_lane(p + i * kLanes, full[i]);
    if constexpr (kHalf) store_lane(p + kFull * kLanes, half);
  }
  // this += s * other
  void add_scaled(T s, const Row& other) {
    const V all = broadcast<V>(s);
    for (int i = 0; i < kFull; ++i) full[i] = multiply_add(all, other.full[i], full[i]);
    if constexpr (kHalf) half = multiply_add(first_half(all), other.half, half);
  }
  void add(const Row& other) {
    for (int i = 0; i < kFull; ++i) full[i] = full[i] + other.full[i];
    if constexpr (kHalf) half = half + other.half;
  }
  void add_to_all(T s) {
    const V all = broadcast<V>(s);
    for (int i = 0; i < kFull; ++i) full[i] = full[i] + all;
    if constexpr (kHalf) half = half + first_half(all);
  }
  void scale(T s) {
    for (int i = 0; i < kFull; ++i) full[i] = full[i] * s;
    if constexpr (kHalf) half = half * s;
  }
  // this += a * b
  void add_product(const Row& a, const Row& b) {
    for (int i = 0; i < kFull; ++i) full[i] = multiply_add(a.full[i], b.full[i], full[i]);
    if constexpr (kHalf) half = multiply_add(a.half, b.half, half);
  }
};

// Calls fn(Row type, first column) for the column groups of a row of `width` channels.
template <typename T, typename Fn>
inline __attribute__((always_inline)) void for_each_column_group(int width, Fn&& fn) {
  int column = 0;
  for (; width - column >= 32; column += 32) fn(Row<T, 4>(), column);
  switch (width - column) {
    case 8:
      return fn(Row<T, 1>(), column);
    case 16:
      return fn(Row<T, 2>(), column);
    case 24:
      return fn(Row<T, 3>(), column);
  }
}

// Calls fn(Row type, column, stride): a row that fits one column group has a constant stride.
template <typename T, typename Fn>
inline __attribute__((always_inline)) void for_each_column_stride(int width, Fn&& fn) {
  for_each_column_group<T>(width, [&](auto tag, int column) {
    using R = decltype(tag);
    if (width == R::kChannels) {
      fn(tag, 0, std::integral_constant<int64_t, R::kChannels>());
    } else {
      fn(tag, column, static_cast<int64_t>(width));
    }
  });
}

#if FASTSEG_ISA_LEVEL >= 1
// Transposes 8 x 8 floats.
inline void transpose(__m256 (&v)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
#endif
