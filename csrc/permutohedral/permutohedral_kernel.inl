// Loops of the permutohedral filter over one tile or one blur chain, once per instruction set.
// A row holds the channels of one point or vertex, padded to a multiple of 8; kernels take rows in
// column groups of up to 32 channels, which stay in registers. A single channel is not padded.

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

// The simplices of n points, n a multiple of 16. features[k * stride + i] is feature k of point i,
// cell[j * stride + i] and so on likewise; see locate().
template <int kD, typename T>
void locate_all(int d, int n, int stride, const T* features, const T* scale, int32_t* cell,
                int32_t* rank, T* weight) {
  using V = typename LaneOf<T>::type;
  constexpr int kLanes = sizeof(V) / sizeof(T), kMax = (kD > 0 ? kD : kMaxFeatures) + 1;
  using I = typename LaneOf<T>::ints;
  const int d1 = (kD > 0 ? kD : d) + 1;
  for (int i = 0; i < n; i += kLanes) {
    V f[kMax], c[kMax], r[kMax], w[kMax];
    for (int k = 0; k + 1 < d1; ++k) f[k] = load_lane<V>(features + k * stride + i);
    locate<kD, T, V>(d, f, scale, c, r, w);
    for (int j = 0; j < d1; ++j) {
      store_lane(cell + j * stride + i, __builtin_convertvector(c[j], I));
      store_lane(rank + j * stride + i, __builtin_convertvector(r[j], I));
      store_lane(weight + j * stride + i, w[j]);
    }
  }
}
template <typename T>
void locate_points(int d, int n, int stride, const T* features, const T* scale, int32_t* cell,
                   int32_t* rank, T* weight) {
  if constexpr (sizeof(T) == 4) {
    if (d == 2) return locate_all<2>(d, n, stride, features, scale, cell, rank, weight);
    if (d == 3) return locate_all<3>(d, n, stride, features, scale, cell, rank, weight);
    if (d == 5) return locate_all<5>(d, n, stride, features, scale, cell, rank, weight);
  }
  return locate_all<0>(d, n, stride, features, scale, cell, rank, weight);
}

// Smallest and largest of n values; false if NaN or infinity is among them.
template <typename T>
bool value_range(const T* values, int64_t n, T* low, T* high) {
  constexpr int kLanes = 32;
  T least[kLanes], most[kLanes], finite[kLanes];  // finite: 0, or NaN
  for (int k = 0; k < kLanes; ++k) {
    least[k] = most[k] = values[0];
    finite[k] = 0;
  }
  const auto visit = [&](int k, T v) {
    least[k] = v < least[k] ? v : least[k];
    most[k] = v > most[k] ? v : most[k];
    finite[k] += v * 0;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) visit(k, values[i + k]);
  }
  for (; i < n; ++i) visit(0, values[i]);
  T sum = 0;
  for (int k = 0; k < kLanes; ++k) {
    least[0] = least[k] < least[0] ? least[k] : least[0];
    most[0] = most[k] > most[0] ? most[k] : most[0];
    sum += finite[k];
  }
  *low = least[0];
  *high = most[0];
  return sum == 0;
}

// For n points, n a multiple of 16, with the cells and ranks of locate_points: the key of the
// remainder-0 vertex, and a number for the order of the ranks. It holds ranks 1..d-1 and which of
// the other two coordinates is larger: at most 63 bits.
template <typename Key>
void pack_simplices(const KeyFields<Key>& fields, int n, int stride, const int32_t* cell,
                    const int32_t* rank, Key* key, uint64_t* order) {
  const int d = fields.d;
  constexpr int kBlock = 16;
  for (int i = 0; i < n; i += kBlock, cell += kBlock, rank += kBlock) {
    Key k[kBlock] = {};
    uint64_t o[kBlock];
    for (int p = 0; p < kBlock; ++p) o[p] = rank[d * stride + p] > rank[p] ? 1 : 0;
    for (int j = 1; j <= d; ++j) {
      const auto low = static_cast<int32_t>(fields.low[j]);
      const int shift = fields.shift[j];
      const int32_t* c = cell + j * stride;
      for (int p = 0; p < kBlock; ++p) {
        k[p] += static_cast<Key>(static_cast<uint32_t>(c[p] - low)) << shift;
      }
    }
    for (int j = 1; j < d; ++j) {
      const int32_t* r = rank + j * stride;
      if (d < 16) {
        for (int p = 0; p < kBlock; ++p) o[p] = o[p] << 4 | static_cast<uint32_t>(r[p]);
      } else {
        for (int p = 0; p < kBlock; ++p) o[p] = o[p] * 17 + static_cast<uint32_t>(r[p]);
      }
    }
    __builtin_memcpy(key + i, k, sizeof(k));
    __builtin_memcpy(order + i, o, sizeof(o));
  }
}

// rows[k] = matrix rows[k] for rows [begin, end); `matrix` is symmetric, width x width.
template <typename T>
void transform_rows(const T* matrix, int64_t begin, int64_t end, int width, T* rows) {
  std::vector<T> source(static_cast<size_t>(width));
  for (int64_t k = begin; k < end; ++k) {
    T* row = rows + k * width;
    __builtin_memcpy(source.data(), row, static_cast<size_t>(width) * sizeof(T));
    for_each_column_group<T>(width, [&](auto tag, int column) {
      using R = decltype(tag);
      R sum = R::zero();
      for (int m = 0; m < width; ++m) {
        sum.add_scaled(source[static_cast<size_t>(m)],
                       R::load(matrix + static_cast<int64_t>(m) * width + column));
      }
      sum.store(row + column);
    });
  }
}

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

// rows[p] *= factor[p]
template <typename T>
void scale_rows(T* rows, int points, int width, const T* factor) {
  for_each_column_group<T>(width, [&](auto tag, int column) {
    using R = decltype(tag);
    for (int p = 0; p < points; ++p) {
      R row = R::load(rows + p * width + column);
      row.scale(factor[p]);
      row.store(rows + p * width + column);
    }
  });
}

// out[p] = in[p] + coefficient * slice_scale[p] * sum_r weight[p][r] * values[vertex(p, r)] for the
// points of a tile, channel by channel; in = null is 0.
template <int kD1, typename T, typename R, typename Stride>
inline void slice_columns(const TileView<T>& tile, const T* values, const T* coefficient,
                          const T* in, T* out, Stride stride) {
  const int d1 = kD1 > 0 ? kD1 : tile.d1;
  const T* weight = tile.weight;
  const T* scale = tile.slice_scale;
  const R factor = R::load(coefficient);
  for (int p = 0; p < tile.points; ++p, weight += d1, out += stride) {
    const int32_t* vertex = tile.simplex_vertex + tile.point_simplex[p] * d1;
    R sum = R::zero();
    for (int r = 0; r < d1; ++r) sum.add_scaled(weight[r], R::load(values + vertex[r] * stride));
    if (scale != nullptr) sum.scale(scale[p]);
    R total = R::zero();
    if (in != nullptr) {
      // Energies stream from memory; the hardware prefetcher stops at every page.
      __builtin_prefetch(in + 64 * stride);
      __builtin_prefetch(in + 64 * stride + 16);
      total = R::load(in);
      in += stride;
    }
    total.add_product(factor, sum);
    total.store(out);
  }
}
template <int kD1, typename T>
inline void slice_scalars(const TileView<T>& tile, const T* values, T coefficient, const T* in,
                          T* out) {
  const int d1 = kD1 > 0 ? kD1 : tile.d1;
  const T* weight = tile.weight;
  for (int p = 0; p < tile.points; ++p, weight += d1) {
    const int32_t* vertex = tile.simplex_vertex + tile.point_simplex[p] * d1;
    T sum = 0;
    for (int r = 0; r < d1; ++r) sum += weight[r] * values[vertex[r]];
    if (tile.slice_scale != nullptr) sum *= tile.slice_scale[p];
    out[p] = (in == nullptr ? T(0) : in[p]) + coefficient * sum;
  }
}
#if FASTSEG_ISA_LEVEL >= 1
// Lanes 0..d1-1.
inline __m256i first_lanes(int d1) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(d1), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// The same for d1 <= 8, a register per point: the vertices of each simplex are gathered once.
inline void slice_short(const TileView<float>& tile, const float* values, float coefficient,
                        const float* in, float* out) {
  const int d1 = tile.d1;
  alignas(32) float corner[kTilePoints * 8];
  const __m256i mask = first_lanes(d1);
  for (int s = 0; s < tile.simplices; ++s) {
    const int32_t* vertex = tile.simplex_vertex + s * d1;
    _mm256_store_ps(corner + s * 8,
                    _mm256_mask_i32gather_ps(__m256(), values, _mm256_maskload_epi32(vertex, mask),
                                             _mm256_castsi256_ps(mask), 4));
  }
  const float* weight = tile.weight;
  for (int p = 0; p < tile.points; p += 8) {
    __m256 v[8];
    const int count = tile.points - p < 8 ? tile.points - p : 8;
    for (int k = 0; k < 8; ++k) v[k] = __m256();
    for (int k = 0; k < count; ++k, weight += d1) {
      v[k] =
          _mm256_maskload_ps(weight, mask) * _mm256_load_ps(corner + tile.point_simplex[p + k] * 8);
    }
    transpose(v);
    __m256 sum = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
    const __m256i points = first_lanes(count);
    if (tile.slice_scale != nullptr) {
      sum = sum * _mm256_maskload_ps(tile.slice_scale + p, points);
    }
    const __m256 start = in == nullptr ? __m256() : _mm256_maskload_ps(in + p, points);
    _mm256_maskstore_ps(out + p, points, multiply_add(__m256() + coefficient, sum, start));
  }
}
#endif
template <typename T>
void slice_tile(const TileView<T>& tile, const T* values, int width, const T* coefficient,
                const T* in, T* out) {
#if FASTSEG_ISA_LEVEL >= 1
  if constexpr (sizeof(T) == 4) {
    if (width == 1 && tile.d1 <= 8) return slice_short(tile, values, *coefficient, in, out);
  }
#endif
  if (width == 1) {
    if (tile.d1 == 3) return slice_scalars<3>(tile, values, *coefficient, in, out);
    if (tile.d1 == 6) return slice_scalars<6>(tile, values, *coefficient, in, out);
    return slice_scalars<0>(tile, values, *coefficient, in, out);
  }
  for_each_column_stride<T>(width, [&](auto tag, int column, auto stride) {
    using R = decltype(tag);
    const T *from = in == nullptr ? in : in + column, *v = values + column,
            *c = coefficient + column;
    if constexpr (sizeof(T) == 4) {
      if (tile.d1 == 3) return slice_columns<3, T, R>(tile, v, c, from, out + column, stride);
      if (tile.d1 == 6) return slice_columns<6, T, R>(tile, v, c, from, out + column, stride);
    }
    slice_columns<0, T, R>(tile, v, c, from, out + column, stride);
  });
}

// sums[row(p, r)] += weight[p][r] * splat_scale[p] * factor[p] * in[p] for the points p of the tile
// and the vertices r of their simplices; factor = null is 1.
template <int kD1, typename T, typename R, typename Stride>
inline void splat_columns(const TileView<T>& tile, const T* in, const T* factor, T* sums,
                          Stride stride) {
  const int d1 = kD1 > 0 ? kD1 : tile.d1;
  const T* weight = tile.weight;
  for (int p = 0; p < tile.points; ++p, weight += d1, in += stride) {
    const int32_t* target = tile.simplex_row + tile.point_simplex[p] * d1;
    R row = R::load(in);
    T scale = factor == nullptr ? T(1) : factor[p];
    if (tile.splat_scale != nullptr) scale *= tile.splat_scale[p];
    row.scale(scale);
    for (int r = 0; r < d1; ++r) {
      R sum = R::load(sums + target[r] * stride);
      sum.add_scaled(weight[r], row);
      sum.store(sums + target[r] * stride);
    }
  }
}
template <int kD1, typename T>
inline void splat_scalars(const TileView<T>& tile, const T* in, const T* factor, T* sums) {
  const int d1 = kD1 > 0 ? kD1 : tile.d1;
  const T* weight = tile.weight;
  for (int p = 0; p < tile.points; ++p, weight += d1) {
    const int32_t* target = tile.simplex_row + tile.point_simplex[p] * d1;
    T value = in[p];
    if (factor != nullptr) value *= factor[p];
    if (tile.splat_scale != nullptr) value *= tile.splat_scale[p];
    for (int r = 0; r < d1; ++r) sums[target[r]] += weight[r] * value;
  }
}
#if FASTSEG_ISA_LEVEL >= 1
// The same for d1 <= 8, a register per point: summed by simplex, then by vertex.
inline void splat_short(const TileView<float>& tile, const float* in, const float* factor,
                        float* sums) {
  const int d1 = tile.d1;
  alignas(32) float corner[kTilePoints * 8];
  for (int s = 0; s < tile.simplices; ++s) _mm256_store_ps(corner + s * 8, __m256());
  const __m256i mask = first_lanes(d1);
  const float* weight = tile.weight;
  for (int p = 0; p < tile.points; ++p, weight += d1) {
    float value = in[p];
    if (factor != nullptr) value *= factor[p];
    if (tile.splat_scale != nullptr) value *= tile.splat_scale[p];
    float* target = corner + tile.point_simplex[p] * 8;
    _mm256_store_ps(target, multiply_add(_mm256_maskload_ps(weight, mask), __m256() + value,
                                         _mm256_load_ps(target)));
  }
  for (int s = 0; s < tile.simplices; ++s) {
    const int32_t* row = tile.simplex_row + s * d1;
    for (int r = 0; r < d1; ++r) sums[row[r]] += corner[s * 8 + r];
  }
}
#endif
template <typename T>
void splat_tile(const TileView<T>& tile, const T* in, const T* factor, int width, T* sums) {
#if FASTSEG_ISA_LEVEL >= 1
  if constexpr (sizeof(T) == 4) {
    if (width == 1 && tile.d1 <= 8) return splat_short(tile, in, factor, sums);
  }
#endif
  if (width == 1) {
    if (tile.d1 == 3) return splat_scalars<3>(tile, in, factor, sums);
    if (tile.d1 == 6) return splat_scalars<6>(tile, in, factor, sums);
    return splat_scalars<0>(tile, in, factor, sums);
  }
  for_each_column_stride<T>(width, [&](auto tag, int column, auto stride) {
    using R = decltype(tag);
    if constexpr (sizeof(T) == 4) {
      if (tile.d1 == 3) {
        return splat_columns<3, T, R>(tile, in + column, factor, sums + column, stride);
      }
      if (tile.d1 == 6) {
        return splat_columns<6, T, R>(tile, in + column, factor, sums + column, stride);
      }
    }
    splat_columns<0, T, R>(tile, in + column, factor, sums + column, stride);
  });
}

// Adds the further partial sums of vertices [begin, end) of the merge list to their first one.
template <typename T>
void merge_rows(const int32_t* vertex, const int32_t* rows_begin, const int32_t* rows,
                int64_t begin, int64_t end, int width, T* values) {
  for (int64_t i = begin; i < end; ++i) {
    T* target = values + static_cast<int64_t>(vertex[i]) * width;
    if (width == 1) {
      for (int64_t k = rows_begin[i]; k < rows_begin[i + 1]; ++k) *target += values[rows[k]];
      continue;
    }
    for_each_column_group<T>(width, [&](auto tag, int column) {
      using R = decltype(tag);
      R sum = R::load(target + column);
      for (int64_t k = rows_begin[i]; k < rows_begin[i + 1]; ++k) {
        sum.add(R::load(values + static_cast<int64_t>(rows[k]) * width + column));
      }
      sum.store(target + column);
    });
  }
}

// Blurs the chains [begin, end) of one axis in place: v + (previous + next) / 2, from old values.
template <typename T>
void blur_chains(const int32_t* chain_begin, const int32_t* vertex, int64_t begin, int64_t end,
                 int width, T* values) {
  if (width == 1) {
    for (int64_t c = begin; c < end; ++c) {
      const int32_t* last = vertex + chain_begin[c + 1] - 1;
      T previous = 0, current = values[vertex[chain_begin[c]]];
      for (const int32_t* v = vertex + chain_begin[c]; v < last; ++v) {
        const T next = values[v[1]];
        values[*v] = current + T(0.5) * (previous + next);
        previous = current;
        current = next;
      }
      values[*last] = current + T(0.5) * previous;
    }
    return;
  }
  for_each_column_group<T>(width, [&](auto tag, int column) {
    using R = decltype(tag);
    T* base = values + column;
    for (int64_t c = begin; c < end; ++c) {
      const int32_t* v = vertex + chain_begin[c];
      const int32_t* last = vertex + chain_begin[c + 1] - 1;
      T* here = base + static_cast<int64_t>(*v) * width;
      R previous = R::zero(), current = R::load(here);
      for (; v < last; ++v) {
        T* there = base + static_cast<int64_t>(v[1]) * width;
        const R next = R::load(there);
        previous.add(next);
        R blurred = current;
        blurred.add_scaled(T(0.5), previous);
        blurred.store(here);
        previous = current;
        current = next;
        here = there;
      }
      R blurred = current;
      blurred.add_scaled(T(0.5), previous);
      blurred.store(here);
    }
  });
}

// Rows of `length` consecutive points, padded with `padding` up to `width` channels, from planar
// data: channel c of point i at planes[c * plane + i]. Multiplies by `sign`.
template <typename T>
void load_rows(const T* planes, int64_t plane, int channels, int64_t length, T sign, T padding,
               int width, int stride, T* rows) {
  int64_t i = 0;
  if (width == 1) {
    for (; i < length; ++i) rows[i] = planes[i] * sign;
    return;
  }
#if FASTSEG_ISA_LEVEL >= 1
  if constexpr (sizeof(T) == 4) {
    // Eight planes at a time, as a core keeps the addresses of few pages at hand. The last eight
    // points overlap those before them where the length is not a multiple of 8.
    for (int c = 0; c < width && length >= 8; c += 8) {
      for (i = 0; i < length; i += 8) {
        if (i + 8 > length) i = length - 8;
        __m256 v[8];
        for (int k = 0; k < 8; ++k) {
          v[k] = c + k < channels ? _mm256_loadu_ps(planes + (c + k) * plane + i) * sign
                                  : __m256() + padding;
        }
        transpose(v);
        for (int k = 0; k < 8; ++k) _mm256_storeu_ps(rows + (i + k) * stride + c, v[k]);
      }
    }
  }
#endif
  for (; i < length; ++i) {
    for (int c = 0; c < width; ++c) {
      rows[i * stride + c] = c < channels ? planes[c * plane + i] * sign : padding;
    }
  }
}

// The inverse of load_rows, without sign and padding.
template <typename T>
void store_rows(const T* rows, int stride, int channels, int64_t length, int64_t plane, T* planes) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i < length; ++i) planes[i] = rows[i];
    return;
  }
#if FASTSEG_ISA_LEVEL >= 1
  if constexpr (sizeof(T) == 4) {
    for (int c = 0; c < channels && length >= 8; c += 8) {
      for (i = 0; i < length; i += 8) {
        if (i + 8 > length) i = length - 8;
        __m256 v[8];
        for (int k = 0; k < 8; ++k) v[k] = _mm256_loadu_ps(rows + (i + k) * stride + c);
        transpose(v);
        for (int k = 0; k < 8 && c + k < channels; ++k) {
          _mm256_storeu_ps(planes + (c + k) * plane + i, v[k]);
        }
      }
    }
  }
#endif
  for (; i < length; ++i) {
    for (int c = 0; c < channels; ++c) planes[c * plane + i] = rows[i * stride + c];
  }
}
